"""Responses in their wire format: OpenAI's, with `trimtab` for what was applied."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from trimtab.serve.monitored import MonitorReport


class ResponseModel(BaseModel):
    """A part of a response."""


class AppliedSteering(ResponseModel):
    """A steering that was requested, or is always on."""

    name: str
    digest: str
    strength: float
    always: bool = False
    layer: int | None = Field(default=None, description="The layer at which it acts, if the request changed it.")
    positions: str | None = Field(default=None, description="The tokens at which it acts, if the request set them.")
    unsteered: Literal["tool_calls", "answer"] | None = Field(
        default=None,
        description="What it doesn't act on because the request doesn't set `positions`: tool calls, or the whole"
        " answer if it is JSON.",
    )
    taken_off: float | None = Field(
        default=None,
        description="The share of its norm that was removed because it lay along steerings that are always on, 0 to 1.",
    )


class DoseReport(ResponseModel):
    """How hard a site was pushed: the mean of ‖edit‖ / ‖activation‖ over `tokens`."""

    layer: int
    kind: str
    ratio: float
    tokens: int


class RejectionReport(ResponseModel):
    """Rejection in one answer: the number of its tokens, at how many the gate was open, and what was decided there."""

    tokens: int
    open: int
    steered: int
    weakened: int
    rejected: int
    changed: int


class AnswerReport(ResponseModel):
    """What steered one answer. `dose` is the largest of `doses`, `total_dose` their sum, which a policy may cap."""

    index: int
    edits: list[str]
    dose: float | None
    total_dose: float | None
    doses: list[DoseReport]
    rejection: RejectionReport | None = None
    monitors: list[MonitorReport] = []


class SteeringReport(ResponseModel):
    """What was applied, in the response's field `trimtab`."""

    steering: list[AppliedSteering]
    emphasized_tokens: int
    answers: list[AnswerReport]
    unheld: list[str] = Field(
        default=[], description="The keywords of schemas that aren't strict which no grammar enforces."
    )


class PromptDetails(ResponseModel):
    """How many of the prompts' tokens were taken from the prefix cache."""

    cached_tokens: int


class Usage(ResponseModel):
    """Token counts; a prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(ResponseModel):
    """A token and its natural log-probability under the steered model, before temperature."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The same, with the most likely tokens at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    """One entry per token."""

    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(ResponseModel):
    """A called function. `arguments` is JSON as the model wrote it; it is cut off if `finish_reason` is `length`."""

    name: str
    arguments: str


class ToolCall(ResponseModel):
    """A tool call."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(ResponseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = Field(default=None, description="The reasoning, if the model thinks.")
    tool_calls: list[ToolCall] | None = Field(default=None, description="The tool calls, if there are tools.")


class ChatChoice(ResponseModel):
    """One of `n` answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter"]


class ChatCompletion(ResponseModel):
    """The answer to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    trimtab: SteeringReport


class TextLogprobs(ResponseModel):
    """One entry per token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(ResponseModel):
    """One answer; with several prompts, all answers to the first come first."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length", "content_filter"]


class Completion(ResponseModel):
    """The answer to a completion request."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    trimtab: SteeringReport


class ModelInfo(ResponseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "trimtab"


class ModelList(ResponseModel):
    """A list of the one model."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]
