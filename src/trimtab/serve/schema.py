"""Requests and responses as they stand on the wire: OpenAI's, with `steering`, `emphasize` and `rejection`.

A field that isn't known is refused: a misspelt one would go unnoticed, and the answer unsteered.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from trimtab.serve.fields import NAME, Finite, In, Nothing, PairText, Seed, Text, Unsupported, UnsupportedChat
from trimtab.serve.monitored import Choices, MonitorTold


class _Out(BaseModel):
    pass


# ---- steering ------------------------------------------------------------------------------------------------


class SteeringChoice(In):
    """A steering of the server's, and what its strength is multiplied by."""

    name: str = Field(max_length=64, examples=["json"])
    strength: Finite = Field(1.0, ge=-100, le=100, description="2 pushes twice as hard, -1 the other way.")
    layer: int | None = Field(
        None, ge=0, lt=10_000, description="Act at this layer instead; for a steering that acts at one."
    )


class PhraseChoice(In):
    """A phrase as it stands in the prompt: all its occurrences, or one of them, counted from 0."""

    text: str = Field(min_length=1, max_length=2000)
    occurrence: int | None = Field(None, ge=0, lt=10_000)


class PartChoice(In):
    """The whole content of a message: number `index` among those of `role`; -1 is the last."""

    role: Literal["system", "user", "assistant"]
    index: int = Field(-1, ge=-1000, lt=1000)


class RejectionChoice(In):
    """How a steering is weakened or rejected where its token is implausible (DIRECTER)."""

    beta: Finite = Field(0.5, ge=0, le=1, description="The least share of the likeliest raw token's probability.")
    ladder: Literal["halve", "strength"] = "halve"
    min_layers: int = Field(2, ge=1, le=10_000)


class Steered(Unsupported):
    """The fields beyond OpenAI's; with its Python client they go into `extra_body`."""

    steering: Annotated[list[SteeringChoice], Field(fail_fast=True)] = Field(
        [], max_length=16, description="Added up.", examples=[[{"name": "json", "strength": 1.2}]]
    )
    emphasize: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=2000)] | PhraseChoice | PartChoice], Field(fail_fast=True)
    ] = Field(
        [], max_length=16, description="What of the prompt to steer attention towards.", examples=[["in one sentence"]]
    )
    rejection: bool | RejectionChoice | None = Field(
        None, description="Weaken or reject steering where it is implausible. With `emphasize` on, unless false."
    )
    clean_cache: bool | None = Field(
        None, description="Steer over the unsteered model's cache, so that a turn leaves no colour on the next."
    )
    monitors: Choices = Field(
        [], max_length=8, description="Monitors of this server that read the answer.", examples=[["harm"]]
    )


# ---- what both kinds of completion are asked by --------------------------------------------------------------


class StreamOptions(In):
    """What else a stream tells."""

    include_usage: bool = Field(False, description="One more chunk at the end, with the tokens counted.")
    include_obfuscation: bool | None = None


Stop = Annotated[str, Field(min_length=1, max_length=200)]


class Common(Steered):
    """What both kinds of completion have."""

    model: str = Field(max_length=512, description="As /v1/models has it.", examples=["trimtab"])
    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="Without it: as many as the server allows.")
    temperature: Finite | None = Field(None, ge=0, le=2, description="1 unless given; 0 is greedy.")
    top_p: Finite | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=128, description="How many answers.")
    stop: Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] | None = Field(
        None, description="At most 4 texts that end an answer; they aren't part of it."
    )
    seed: Seed | None = Field(None, description="The same seed gives the same samples; answer i of `n` has seed + i.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = Field(None, description="Taken, and kept nowhere.")


class TextPart(In):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(In):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=1000, fail_fast=True)] = Field(
        "", description="Of the assistant's messages it may be missing."
    )
    name: str | None = Field(None, max_length=64, description="Taken, and not told to the model.")
    refusal: None = None
    audio: None = None
    function_call: None = None
    reasoning_content: Literal[""] | None = None
    tool_calls: Nothing | None = None
    annotations: Nothing | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise PydanticCustomError("no_content", "a message of the {role}'s needs content", {"role": self.role})
        return self


class ChatRequest(Common, UnsupportedChat):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "trimtab",
                    "messages": [{"role": "user", "content": "Name a fruit."}],
                    "max_tokens": 32,
                    "temperature": 0,
                    "steering": [{"name": "json", "strength": 1.2}],
                }
            ]
        }
    )

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=1000)
    continue_final_message: bool | None = Field(
        None,
        description="Go on with the last message, the assistant's, instead of answering it: as vLLM's server does. The"
        " response holds what was added.",
    )
    add_generation_prompt: bool | None = Field(
        None, description="false with `continue_final_message`, else true; neither has to be said."
    )
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] | None = Field(
        None,
        description="Keywords of the model's chat template. One that it doesn't use is refused.",
        examples=[{"enable_thinking": False}],
    )
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=1_000_000, fail_fast=True)]
Prompts = (
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=64, fail_fast=True)]
    | Ids
    | Annotated[list[Ids], Field(min_length=1, max_length=64, fail_fast=True)]
)


class CompletionRequest(Common):
    """`POST /v1/completions`: plain text, no chat template."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "trimtab", "prompt": "The sea is", "max_tokens": 16, "temperature": 0}]
        }
    )

    prompt: Prompts = Field(description="A text, several, or token ids.")
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = Field(None, description="Not supported.")
    suffix: Literal[""] | None = Field(None, description="Not supported.")
    best_of: Literal[1] | None = Field(None, description="Not supported.")


# ---- responses -----------------------------------------------------------------------------------------------


class AppliedSteering(_Out):
    """A steering that was asked for, or is always on."""

    name: str
    digest: str
    strength: float
    always: bool = False
    layer: int | None = Field(default=None, description="Where it acts instead of where it was learned.")
    taken_off: float | None = Field(
        default=None,
        description="The share of its length that was taken off, as it lay along what is always on: 0 to 1.",
    )


class DoseTold(_Out):
    """How hard a site was pushed: the mean of ‖edit‖ / ‖activation‖ over `tokens`."""

    layer: int
    kind: str
    ratio: float
    tokens: int


class RejectionTold(_Out):
    """Of an answer's tokens: at how many the gate was open, and what came of it."""

    tokens: int
    open: int
    steered: int
    weakened: int
    rejected: int
    changed: int


class AppliedTold(_Out):
    """What steered one answer. `dose` is the largest of `doses`, `total_dose` their sum, which a policy may cap."""

    index: int
    edits: list[str]
    dose: float | None
    total_dose: float | None
    doses: list[DoseTold]
    rejection: RejectionTold | None = None
    monitors: list[MonitorTold] = []


class Told(_Out):
    """What was applied, in the response's field `trimtab`."""

    steering: list[AppliedSteering]
    emphasized_tokens: int
    answers: list[AppliedTold]


class PromptDetails(_Out):
    """How many of the prompts' tokens were taken over from texts that were read before."""

    cached_tokens: int


class Usage(_Out):
    """Tokens; the prompt's counted once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(_Out):
    """A token and its natural log-probability under the steered model, before any temperature."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The same, with the likeliest tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Out):
    """One entry a token."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(_Out):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(_Out):
    """One of `n` answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "content_filter"]


class ChatCompletion(_Out):
    """The answer to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    trimtab: Told


class TextLogprobs(_Out):
    """One entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(_Out):
    """One answer; prompts' answers come one prompt after the other."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length", "content_filter"]


class Completion(_Out):
    """The answer to a completion request."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    trimtab: Told


class ModelTold(_Out):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "trimtab"


class ModelList(_Out):
    """All one of them."""

    object: Literal["list"] = "list"
    data: list[ModelTold]


class SteeringTold(_Out):
    """A steering that requests may name. `card` says what it was learned from, and what was measured."""

    name: str
    object: Literal["steering"] = "steering"
    digest: str
    source: Literal["file", "uploaded", "learned", "made"]
    layers: list[int]
    edits: list[str]
    strength: list[float] = Field(description="The range that you may ask for.", examples=[[-4, 4]])
    always: bool
    card: dict[str, Any]


class SteeringList(_Out):
    """The steerings that you may use."""

    object: Literal["list"] = "list"
    data: list[SteeringTold]


class Deleted(_Out):
    """A steering that is no longer there."""

    id: str
    object: Literal["steering.deleted"] = "steering.deleted"
    deleted: bool = True


class PairMessage(In):
    """A message of a prompt or an answer that is learned from."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: PairText


Side = PairText | Annotated[list[PairMessage], Field(max_length=64, fail_fast=True)]
Pairs = Annotated[list[Annotated[dict[str, Side], Field(max_length=16)]], Field(fail_fast=True)]


class LearnRequest(In):
    """`POST /v1/steerings`: learn one from pairs, as `trimtab learn` does from a file of them."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "polite",
                    "method": "caa",
                    "pairs": [{"prompt": "How are you?", "positive": "Splendid, thanks!", "negative": "Go away."}],
                }
            ]
        }
    )

    name: str = Field(pattern=NAME)
    method: Literal["caa", "instruct"]
    pairs: Pairs = Field(min_length=1, max_length=512)
    layers: Annotated[list[Annotated[int, Field(ge=0, lt=10_000)]], Field(fail_fast=True)] | None = Field(
        None, min_length=1, max_length=256
    )


class MakeRequest(In):
    """`POST /v1/steerings/make`: make one from an idea and say what it is worth, as `trimtab make` does.

    Either `idea`, or `like` with or without `unlike`, or `pairs`.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "pirate", "idea": "talk like a pirate"}]})

    name: str = Field(pattern=NAME)
    idea: str | None = Field(
        None,
        min_length=1,
        max_length=500,
        description="A sentence. Its opposite may stand after 'not': be blunt, not flattering.",
    )
    like: str | None = Field(
        None, min_length=1, max_length=200, description="Or a persona that the model is to be like."
    )
    unlike: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="And one that it must be unlike; without it an ordinary assistant.",
    )
    pairs: Pairs | None = Field(
        None,
        min_length=16,
        max_length=512,
        description="Or pairs of yours, as POST /v1/steerings takes them: some to learn from, others for the verdict.",
    )
    questions: int = Field(
        40, ge=16, le=40, description="How many are asked: half to learn from, half for the verdict. Not with pairs."
    )
    tokens: int | None = Field(
        None, ge=8, le=256, description="The most of an answer. Without it: 64, or as many as the server allows."
    )
    distill: bool = Field(True, description="Whether to distill too, which holds more and takes longest.")
    keep: bool = Field(False, description="Whether to add it even if the verdict is none.")
    stream: bool = Field(False, description="Whether to tell in events how far it has come.")


class VerdictTold(_Out):
    """What it is worth, on questions that it wasn't learned from; `trimtab make` explains each figure."""

    share_of_prompt: float | None = Field(
        None,
        description="The part of the system prompt's effect that it has without it. `null` where none stands behind the"
        " pairs; then `gain` says it in nats a token.",
    )
    gain: float | None = Field(None, description="How much the wanted answers gain on the others, in nats a token.")
    likelier: float | None = Field(None, description="How much likelier they are themselves, in nats a token.")
    interval: list[float] = Field(description="The 95 % interval of the share or the gain.", examples=[[0.4, 0.7]])
    random: list[float] = Field(description="The same of random directions.")
    questions: int
    loops: float = Field(description="The share of answers that go in circles.")
    loops_prompted: float | None = Field(None, description="The same under the system prompt.")
    loops_unsteered: float | None = Field(None, description="The same without steering, where there is no such prompt.")
    perplexity_ratio: float | None
    signs: list[float] | None = Field(
        None, description="The share of answers with the idea's words: unsteered, under the system prompt, steered."
    )
    holds: bool
    why_not: str = Field(description="What speaks against it; empty if it holds.")
    lines: list[str] = Field(description="All of that in words.")


class ExampleTold(_Out):
    """A question, and three answers to it; `prompted` is `null` where there is no system prompt."""

    question: str
    unsteered: str
    prompted: str | None
    steered: str


class MadeTold(_Out):
    """What was made. `steering` is there if it was added: if the verdict holds, or `keep` asked for it."""

    object: Literal["steering.made"] = "steering.made"
    name: str
    added: bool
    idea: str
    source: str = Field(description="Where the system prompts come from.", examples=["trait pirate"])
    chosen: str = Field(description="Which of the ways to learn it did best.")
    verdict: VerdictTold
    examples: list[ExampleTold] = Field(
        max_length=4, description="None where the server's policy would steer, cap or refuse such answers."
    )
    steering: SteeringTold | None
