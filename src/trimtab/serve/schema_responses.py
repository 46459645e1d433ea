"""`POST /v1/responses`, OpenAI's newer API: its requests and responses."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from trimtab.serve.fields import OFF, Finite, Metadata, Nothing, RequestModel, Seed, Text
from trimtab.serve.schema import Steered, Stop, StreamOptions
from trimtab.serve.schema_output import ResponseModel, SteeringReport
from trimtab.serve.schema_tools import FunctionName, FunctionSpec, NamedSchema, ObjectFormat, TextFormat

Id = Annotated[str, Field(max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]

# ---- requests ------------------------------------------------------------------------------------------------


class ContentPart(RequestModel):
    """A text in a message: the user's, or the model's sent back."""

    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: Nothing | None = None
    logprobs: Annotated[list[Any], Field(max_length=100_000)] | None = Field(
        None, description="Accepted in an answer that is sent back, and ignored."
    )


class ContentImage(RequestModel):
    """An image in a user message, as a `data:` URL."""

    type: Literal["input_image"]
    image_url: str = Field(max_length=64 << 20, examples=["data:image/png;base64,…"])
    detail: Literal["auto", "low", "high", "original"] | None = None


TextContent = Text | Annotated[list[ContentPart], Field(max_length=1000, fail_fast=True)]
Part = Annotated[ContentPart | ContentImage, Field(discriminator="type")]
Content = Text | Annotated[list[Part], Field(max_length=1000, fail_fast=True)]


class MessageItem(RequestModel):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: Id | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(RequestModel):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Id
    name: FunctionName
    arguments: Text
    id: Id | None = None
    status: Status | None = None


class OutputItem(RequestModel):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: Id
    output: TextContent
    id: Id | None = None
    status: Status | None = None


class ReasoningText(RequestModel):
    """The model's thinking."""

    type: Literal["reasoning_text", "summary_text"]
    text: Text


Thoughts = Annotated[list[ReasoningText], Field(max_length=1000, fail_fast=True)]


class ReasoningItem(RequestModel):
    """The model's earlier thinking, sent back."""

    type: Literal["reasoning"]
    id: Id | None = None
    summary: Thoughts | None = None
    content: Thoughts | None = None
    encrypted_content: Literal[""] | None = None
    status: Status | None = None


def _kind(item: Any) -> str | None:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class FunctionTool(FunctionSpec):
    """A function that the model may call."""

    type: Literal["function"]


class NamedTool(RequestModel):
    """The one tool that must be called."""

    type: Literal["function"]
    name: FunctionName


class FlatSchema(NamedSchema):
    """JSON that matches a schema."""

    type: Literal["json_schema"]


class TextOptions(RequestModel):
    """The format of the text."""

    format: Annotated[TextFormat | ObjectFormat | FlatSchema, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = Field(None, description=OFF)


class NoReasoning(RequestModel):
    """Options that have no effect: the model's chat template decides whether it thinks."""

    effort: Literal["none"] | None = None
    summary: Literal["auto"] | None = None
    generate_summary: None = None


LOGPROBS = "message.output_text.logprobs"
Included = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]


class ResponsesRequest(Steered):
    """`POST /v1/responses`. Nothing is stored: each request contains the conversation so far."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "trimtab", "input": "Name a fruit.", "steering": [{"name": "json", "strength": 1.2}]}
            ]
        }
    )

    model: str = Field(max_length=512, examples=["trimtab"])
    input: Text | Annotated[list[Item], Field(min_length=1, max_length=1000, fail_fast=True)] = Field(
        description="A message of the user as a string, or the items of the conversation."
    )
    instructions: Text | None = Field(None, description="A system message before the input.")
    tools: Annotated[list[FunctionTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: Finite | None = Field(None, ge=0, le=2)
    top_p: Finite | None = Field(None, gt=0, le=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    user: str | None = Field(None, max_length=512)
    metadata: Metadata | None = Field(None, description="Sent back, but not stored.")
    store: bool | None = Field(None, description="Accepted and ignored: nothing is stored.")
    include: Annotated[list[Included], Field(max_length=8, fail_fast=True)] | None = Field(
        None,
        description="Log-probabilities of the text's tokens. `reasoning.encrypted_content` is accepted and ignored.",
    )
    reasoning: NoReasoning | None = Field(None, description=OFF)
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = Field(None, description=OFF)
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = Field(None, max_length=512)
    prompt_cache_key: str | None = Field(None, max_length=512)
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="The number of most likely tokens to return at each position, if `include` asks for"
        " log-probabilities.",
    )


# ---- responses -----------------------------------------------------------------------------------------------


class LikelyToken(ResponseModel):
    """A token and its natural log-probability under the steered model, before temperature."""

    token: str
    logprob: float
    bytes: list[int]


class TextToken(LikelyToken):
    """The same, with the most likely tokens at its position."""

    top_logprobs: list[LikelyToken]


class OutputText(ResponseModel):
    """Text for the reader."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[TextToken] = Field(default_factory=list)


class OutputMessage(ResponseModel):
    """A message from the model."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class OutputCall(ResponseModel):
    """A tool call; `arguments` is JSON, cut off if its status is `incomplete`."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: Status
    call_id: str
    name: str
    arguments: str


class OutputThought(ResponseModel):
    """A part of the thinking."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputReasoning(ResponseModel):
    """The model's thinking."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    status: Status
    summary: list[Any] = Field(default_factory=list)
    content: list[OutputThought]


Output = OutputMessage | OutputCall | OutputReasoning


class Incomplete(ResponseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class InputDetails(ResponseModel):
    """Details about the prompt's tokens; how many the server took from its cache isn't reported here."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(ResponseModel):
    """Details about the answer's tokens."""

    reasoning_tokens: int


class ResponseUsage(ResponseModel):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputDetails = Field(default_factory=InputDetails)
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseObject(ResponseModel):
    """The response, which repeats the parameters of its request."""

    id: str
    object: Literal["response"] = "response"
    created_at: float
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, Any] | None = None
    incomplete_details: Incomplete | None = None
    output: list[Output]
    usage: ResponseUsage | None = None
    instructions: str | None
    tools: list[Any]
    tool_choice: Any
    parallel_tool_calls: bool
    text: Any
    temperature: float
    top_p: float
    max_output_tokens: int | None
    metadata: dict[str, str]
    user: str | None
    store: Literal[False] = False
    background: Literal[False] = False
    previous_response_id: None = None
    reasoning: None = None
    truncation: Literal["disabled"] = "disabled"
    trimtab: SteeringReport | None = Field(
        default=None, description="What was applied; present once the response is complete."
    )
