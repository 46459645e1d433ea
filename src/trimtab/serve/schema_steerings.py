"""Requests and responses about the server's steerings: listing, learning and making them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from trimtab.serve.fields import NAME, PairText, RequestModel
from trimtab.serve.schema_output import ResponseModel


class SteeringInfo(ResponseModel):
    """A steering that requests may name. `card` says what it was learned from, and what was measured."""

    name: str
    object: Literal["steering"] = "steering"
    digest: str
    source: Literal["file", "uploaded", "learned", "made"]
    layers: list[int]
    edits: list[str]
    strength: list[float] = Field(description="The range that you may request.", examples=[[-4, 4]])
    always: bool
    card: dict[str, Any]


class SteeringList(ResponseModel):
    """The steerings that you may use."""

    object: Literal["list"] = "list"
    data: list[SteeringInfo]


class Deleted(ResponseModel):
    """A steering that was deleted."""

    id: str
    object: Literal["steering.deleted"] = "steering.deleted"
    deleted: bool = True


class PairMessage(RequestModel):
    """A message of a prompt or an answer to learn from."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: PairText


Side = PairText | Annotated[list[PairMessage], Field(max_length=64, fail_fast=True)]
Pairs = Annotated[list[Annotated[dict[str, Side], Field(max_length=16)]], Field(fail_fast=True)]


class LearnRequest(RequestModel):
    """`POST /v1/steerings`: learn one from pairs, as `trimtab learn` does from a file of pairs."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
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


class MakeRequest(RequestModel):
    """`POST /v1/steerings/make`: make one from an idea and measure its effect, as `trimtab make` does.

    Give `idea`, or `like` with or without `unlike`, or `pairs`.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        json_schema_extra={"examples": [{"name": "pirate", "idea": "talk like a pirate"}]}
    )

    name: str = Field(pattern=NAME)
    idea: str | None = Field(
        None,
        min_length=1,
        max_length=500,
        description="A sentence, optionally with its opposite after 'not': be blunt, not flattering.",
    )
    like: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Instead of a sentence: a persona that the model should be like.",
    )
    unlike: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="A persona that the model should be unlike. Default: an ordinary assistant.",
    )
    pairs: Pairs | None = Field(
        None,
        min_length=16,
        max_length=512,
        description="Or your own pairs, as in POST /v1/steerings: some to learn from, others for the verdict.",
    )
    questions: int = Field(
        40,
        ge=16,
        le=40,
        description="The number of questions: half to learn from, half for the verdict. Not with `pairs`.",
    )
    tokens: int | None = Field(
        None, ge=8, le=256, description="The maximum tokens of an answer. Default: 64, or as many as the server allows."
    )
    distill: bool = Field(True, description="Whether to distill too, which captures more and takes the longest.")
    keep: bool = Field(False, description="Whether to add the steering even if the verdict is negative.")
    stream: bool = Field(False, description="Whether to send the progress as events.")


class VerdictReport(ResponseModel):
    """The measured effect, on questions that it wasn't learned from; `trimtab make` explains each figure."""

    share_of_prompt: float | None = Field(
        None,
        description="The share of the system prompt's effect that the steering has without the prompt. `null` for"
        " pairs without a system prompt; see `gain` instead, in nats per token.",
    )
    gain: float | None = Field(
        None, description="How much likelier the wanted answers become relative to the others, in nats per token."
    )
    likelier: float | None = Field(
        None, description="How much likelier the wanted answers become by themselves, in nats per token."
    )
    interval: list[float] = Field(description="The 95 % interval of the share or the gain.", examples=[[0.4, 0.7]])
    random: list[float] = Field(description="The same for random directions.")
    p: float = Field(
        description="The p-value: the largest of the exact paired tests against the unsteered model and against each"
        " random direction."
    )
    questions: int
    loops: float = Field(description="The share of answers that are repetitive.")
    loops_p: float = Field(description="The p-value of the increase in repetitive answers (exact paired test).")
    loops_prompted: float | None = Field(None, description="The same under the system prompt.")
    loops_unsteered: float | None = Field(None, description="The same without steering, if there is no system prompt.")
    perplexity_ratio: float | None
    signs: list[float] | None = Field(
        None, description="The share of answers with the idea's words: unsteered, under the system prompt, steered."
    )
    holds: bool
    why_not: str = Field(description="Why the verdict is negative; empty if it holds.")
    lines: list[str] = Field(description="The verdict in words.")


class ExampleAnswers(ResponseModel):
    """A question, and three answers to it; `prompted` is `null` if there is no system prompt."""

    question: str
    unsteered: str
    prompted: str | None
    steered: str


class MakeResponse(ResponseModel):
    """What was made. `steering` is there if it was added: if the verdict holds, or `keep` asked for it."""

    object: Literal["steering.made"] = "steering.made"
    name: str
    added: bool
    idea: str
    source: str = Field(description="The source of the system prompts.", examples=["trait pirate"])
    chosen: str = Field(description="The learning method that did best.")
    verdict: VerdictReport
    examples: list[ExampleAnswers] = Field(
        max_length=4, description="Empty if the server's policy would steer, cap or refuse such answers."
    )
    steering: SteeringInfo | None
