"""Requests in their wire format: OpenAI's, with `steering`, `emphasize` and `rejection`.

Unknown fields are refused: a misspelled one would go unnoticed, and the answer would be unsteered.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from trimtab.serve.fields import Finite, Metadata, Nothing, RequestModel, Seed, Text, Unsupported, UnsupportedChat
from trimtab.serve.monitored import Choices
from trimtab.serve.schema_tools import Call, ResponseFormat, ToolChoice, Tools

# ---- steering ------------------------------------------------------------------------------------------------


class SteeringChoice(RequestModel):
    """A steering of the server, and the factor for its strength."""

    name: str = Field(max_length=64, examples=["json"])
    strength: Finite = Field(1.0, ge=-100, le=100, description="2 pushes twice as hard, -1 in the opposite direction.")
    layer: int | None = Field(
        None, ge=0, lt=10_000, description="Act at this layer instead; only for a steering that acts at one layer."
    )
    positions: str | None = Field(
        None,
        min_length=1,
        max_length=500,
        examples=["answer"],
        description="Act at these tokens instead, in the format of --positions. Default: the steering's own, except"
        " in tool calls and in answers constrained by `response_format`.",
    )


class PhraseChoice(RequestModel):
    """A phrase exactly as it is in the prompt: all its occurrences, or one of them, counted from 0."""

    text: str = Field(min_length=1, max_length=2000)
    occurrence: int | None = Field(None, ge=0, lt=10_000)


class PartChoice(RequestModel):
    """The whole content of a message: number `index` among the messages of `role`; -1 is the last."""

    role: Literal["system", "user", "assistant"]
    index: int = Field(-1, ge=-1000, lt=1000)


class RejectionChoice(RequestModel):
    """How a steering is weakened or rejected where the steered token is implausible (DIRECTER)."""

    beta: Finite = Field(
        0.5, ge=0, le=1, description="The minimum probability, relative to the most likely unsteered token's."
    )
    ladder: Literal["halve", "strength"] = "halve"
    min_layers: int = Field(2, ge=1, le=10_000)


Emphasized = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=2000)] | PhraseChoice | PartChoice], Field(fail_fast=True)
]
"""The parts of a prompt to emphasize."""


class Steered(Unsupported):
    """The fields beyond OpenAI's; with its Python client they go into `extra_body`."""

    steering: Annotated[list[SteeringChoice], Field(fail_fast=True)] = Field(
        [], max_length=16, description="Their effects add up.", examples=[[{"name": "json", "strength": 1.2}]]
    )
    emphasize: Emphasized = Field(
        [], max_length=16, description="Parts of the prompt to steer attention towards.", examples=[["in one sentence"]]
    )
    rejection: bool | RejectionChoice | None = Field(
        None, description="Weaken or reject steering where it is implausible. Default: on with `emphasize`, else off."
    )
    clean_cache: bool | None = Field(
        None,
        description="Steer over the unsteered model's KV cache, so that a steered turn doesn't affect the next one.",
    )
    monitors: Choices = Field(
        [], max_length=8, description="Monitors of this server that read the answer.", examples=[["harm"]]
    )


# ---- fields of both kinds of completion ----------------------------------------------------------------------


class StreamOptions(RequestModel):
    """What a stream includes besides the answer."""

    include_usage: bool = Field(False, description="Send one more chunk at the end, with the token counts.")
    include_obfuscation: bool | None = None


Stop = Annotated[str, Field(min_length=1, max_length=200)]


class Common(Steered):
    """The fields of both kinds of completion."""

    model: str = Field(max_length=512, description="A name from /v1/models, or `trimtab`.", examples=["trimtab"])
    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="Default: as many as the server allows.")
    temperature: Finite | None = Field(None, ge=0, le=2, description="Default: 1; 0 is greedy.")
    top_p: Finite | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=128, description="The number of answers.")
    stop: Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] | None = Field(
        None, description="At most 4 strings that end an answer; they aren't part of it."
    )
    seed: Seed | None = Field(None, description="The same seed gives the same samples; answer i of `n` has seed + i.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)
    metadata: Metadata | None = Field(None, description="Accepted and ignored.")


class TextPart(RequestModel):
    """A text part of a message's content."""

    type: Literal["text"]
    text: Text


class ImageAddress(RequestModel):
    """An image, as a `data:` URL: the server fetches nothing."""

    url: str = Field(max_length=64 << 20, examples=["data:image/png;base64,…"])
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="Accepted and ignored: the model's processor determines the resolution."
    )


class ImagePart(RequestModel):
    """An image in a user message, for image-text models."""

    type: Literal["image_url"]
    image_url: ImageAddress


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(RequestModel):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(max_length=1000, fail_fast=True)] = Field(
        "", description="Optional in assistant messages."
    )
    name: str | None = Field(None, max_length=64, description="Accepted, but not shown to the model.")
    refusal: None = None
    audio: None = None
    function_call: None = None
    reasoning_content: Text | None = Field(None, description="In assistant messages: the reasoning.")
    tool_calls: Annotated[list[Call], Field(max_length=128, fail_fast=True)] | None = Field(
        None, description="In assistant messages: the tool calls."
    )
    tool_call_id: str | None = Field(None, max_length=256, description="In tool messages: the call that it answers.")
    annotations: Nothing | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise PydanticCustomError("no_content", "a message with the role {role} needs content", {"role": self.role})
        return self


class ChatRequest(Common, UnsupportedChat):
    """`POST /v1/chat/completions`."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
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
        description="Continue the last message, which is the assistant's, instead of answering it, as vLLM's server"
        " does. The response contains only the continuation.",
    )
    add_generation_prompt: bool | None = Field(
        None, description="Optional: false with `continue_final_message`, else true."
    )
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] | None = Field(
        None,
        description="Keywords of the model's chat template. Ones that it doesn't use are refused.",
        examples=[{"enable_thinking": False}],
    )
    tools: Tools | None = Field(None, description="The tools that the model may call.")
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = Field(
        None, description="Whether the model calls a tool. Default: `auto` if there are tools."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most.")
    response_format: ResponseFormat | None = Field(
        None, description="Answers in JSON: every answer is valid unless it is cut off at `max_tokens`."
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

    model_config: ClassVar[ConfigDict] = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "trimtab", "prompt": "The sea is", "max_tokens": 16, "temperature": 0}]
        }
    )

    prompt: Prompts = Field(description="A string, several, or token ids.")
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = Field(None, description="Not supported.")
    suffix: Literal[""] | None = Field(None, description="Not supported.")
    best_of: Literal[1] | None = Field(None, description="Not supported.")
