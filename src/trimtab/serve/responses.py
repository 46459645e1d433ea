"""OpenAI's Responses API: requests are converted to chats, and answers to lists of items, or events when streaming."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from trimtab.serve.refusals import Refusal
from trimtab.serve.responses_logprobs import TextTokens
from trimtab.serve.schema import ChatRequest
from trimtab.serve.schema_responses import (
    LOGPROBS,
    CallItem,
    Content,
    ContentImage,
    ContentPart,
    FlatSchema,
    Incomplete,
    Item,
    MessageItem,
    NamedTool,
    Output,
    OutputCall,
    OutputDetails,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputThought,
    ReasoningItem,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    TextContent,
    TextToken,
)
from trimtab.serve.service import Prepared
from trimtab.serve.tasks import GeneratedToken, Piece
from trimtab.serve.wire import CollectedAnswer, summary_of
from trimtab.text.answer_parts import AnswerPart, AnswerText, CallArguments, CallStart, ThinkingText

# ---- requests ------------------------------------------------------------------------------------------------

SHARED_FIELDS = (
    "model",
    "parallel_tool_calls",
    "temperature",
    "top_p",
    "stop",
    "seed",
    "stream",
    "chat_template_kwargs",
)
"""Fields that chat requests have under the same name."""
STEERED = ("steering", "emphasize", "rejection")


def as_chat(request: ResponsesRequest) -> ChatRequest:
    """The chat request that is equivalent to a Responses request."""
    fields: dict[str, Any] = {name: getattr(request, name) for name in (*SHARED_FIELDS, "user", "metadata")}
    fields |= {name: getattr(request, name) for name in STEERED if name in request.model_fields_set}
    fields["messages"] = _messages(request)
    fields["max_completion_tokens"] = request.max_output_tokens
    if LOGPROBS in (request.include or ()):
        fields |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    elif request.top_logprobs:
        raise Refusal(400, f"top_logprobs needs include: [{LOGPROBS!r}]", param="top_logprobs")
    if request.tools:
        fields["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in request.tools
        ]
    choice = request.tool_choice
    if isinstance(choice, NamedTool):
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        fields["tool_choice"] = choice
    format = request.text.format if request.text is not None else None
    if isinstance(format, FlatSchema):
        schema = format.model_dump(by_alias=True, exclude={"type"})
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif format is not None:
        fields["response_format"] = format.model_dump()
    try:
        return ChatRequest.model_validate({name: _plain(value) for name, value in fields.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise Refusal(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}", param="input") from None


def as_responses(refusal: Refusal) -> Refusal:
    """A refusal of a chat, with `param` renamed to the field of the Responses request."""
    param = refusal.param or ""
    for chats, here in (
        ("messages", "input"),
        ("response_format.json_schema", "text.format"),
        ("response_format", "text.format"),
        ("max_tokens", "max_output_tokens"),
    ):
        if param.startswith(chats):
            param = here if chats == "messages" else here + param.removeprefix(chats)
    param = param.replace(".function", "")
    return Refusal(refusal.status, refusal.message, code=refusal.code, param=param or None, retry=refusal.retry)


def _plain(value: Any) -> Any:
    """Pydantic models as the dictionaries that they were made from."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.model_dump(exclude_unset=True) if hasattr(value, "model_dump") else value


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for item in request.input:
        _add(messages, item)
    return messages


def _add(messages: list[dict[str, Any]], item: Item) -> None:
    """Add an item. The thinking, text and calls of one answer are one message."""
    if isinstance(item, OutputItem):
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        return
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if isinstance(item, MessageItem):
        text = _message_content(item.content)
        if item.role == "assistant" and last is not None and not last["content"] and "tool_calls" not in last:
            last["content"] = text  # the preceding thinking belongs to it
        else:
            messages.append({"role": item.role, "content": text})
        return
    if last is None:
        last = {"role": "assistant", "content": ""}
        messages.append(last)
    if isinstance(item, ReasoningItem):
        texts = [part.text for part in (item.content or item.summary or ())]
        last["reasoning_content"] = "\n".join([*filter(None, [last.get("reasoning_content")]), *texts])
    elif isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        last.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})


def _text(content: TextContent) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _message_content(content: Content) -> str | list[dict[str, Any]]:
    """A message's text, or its parts in the chat format if it has images."""
    if isinstance(content, str):
        return content
    if not any(isinstance(part, ContentImage) for part in content):
        return "\n".join(part.text for part in content if isinstance(part, ContentPart))
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, ContentPart)
        else {"type": "image_url", "image_url": {"url": part.image_url}}
        for part in content
    ]


# ---- answers -------------------------------------------------------------------------------------------------


def new_response_id() -> str:
    """A new id for a response."""
    return f"resp_{uuid.uuid4().hex}"


@dataclass
class ResponseWire:
    """Writes the answer to one request, whole or as events.

    `request` is the original request; `tokens` is set if it asks for log-probabilities.
    """

    id: str
    request: ResponsesRequest
    tokens: TextTokens | None = None
    created: float = field(default_factory=time.time)
    items: list[Output] = field(default_factory=list)
    _number: int = 0

    def whole(self, prepared: Prepared, answers: Sequence[CollectedAnswer]) -> dict[str, Any]:
        """The response to a request that doesn't stream."""
        (answer,) = answers
        for parts, tokens in answer.parts_by_event:
            logprobs = self._logprobs(parts, tokens)
            for part in parts:
                self._take(part)
                logprobs = self._put(part, logprobs)
        self._finish_items("incomplete" if self._cut(answer) else "completed")
        return self._response(prepared, answer)

    def opening(self, _index: int) -> list[dict[str, Any]]:
        """The first events."""
        response = self._response()
        return [self._event(f"response.{name}", response=response) for name in ("created", "in_progress")]

    def piece(self, _index: int, piece: Piece, parts: Sequence[AnswerPart], _before: int) -> list[dict[str, Any]]:
        """The events for a new piece of the answer."""
        return self._events(parts, piece.tokens)

    def ending(self, _index: int, answer: CollectedAnswer, parts: Sequence[AnswerPart]) -> list[dict[str, Any]]:
        """The events for the rest of the answer, and for the end of the last item."""
        return [*self._events(parts, ()), *self._close("incomplete" if self._cut(answer) else "completed")]

    def last(self, prepared: Prepared, answers: Sequence[CollectedAnswer], _usage: bool) -> dict[str, Any]:
        """The last event, with the whole response."""
        (answer,) = answers
        name = "incomplete" if self._cut(answer) else "completed"
        return self._event(f"response.{name}", response=self._response(prepared, answer))

    def failed(self, refusal: Refusal) -> list[dict[str, Any]]:
        """The last events of a stream that failed."""
        error = {"code": refusal.code or "server_error", "message": refusal.message}
        self._finish_items("incomplete")
        response = {**self._response(), "status": "failed", "error": error}
        return [self._event("response.failed", response=response)]

    def encode(self, chunk: dict[str, Any]) -> bytes:
        data = json.dumps(chunk, allow_nan=False, separators=(",", ":"))
        return f"event: {chunk['type']}\ndata: {data}\n\n".encode()

    end = b""
    """The last event marks the end; nothing follows it."""

    # ---- items -------------------------------------------------------------------------------------------

    def _take(self, part: AnswerPart) -> bool:
        """Add a part to the item that it belongs to; returns whether the item is new."""
        last = self.items[-1] if self.items else None
        if isinstance(part, CallStart):
            name, call = f"fc_{uuid.uuid4().hex}", part
            self.items.append(OutputCall(id=name, status="in_progress", call_id=call.id, name=call.name, arguments=""))
            return True
        if isinstance(part, CallArguments):
            assert isinstance(last, OutputCall)
            last.arguments += part.text
            return False
        if isinstance(part, AnswerText):
            if isinstance(last, OutputMessage):
                last.content[0].text += part.text
                return False
            content = [OutputText(text=part.text)]
            self.items.append(OutputMessage(id=f"msg_{uuid.uuid4().hex}", status="in_progress", content=content))
            return True
        if isinstance(last, OutputReasoning):
            last.content[0].text += part.text
            return False
        thought = [OutputThought(text=part.text)]
        self.items.append(OutputReasoning(id=f"rs_{uuid.uuid4().hex}", status="in_progress", content=thought))
        return True

    def _logprobs(self, parts: Sequence[AnswerPart], tokens: Sequence[GeneratedToken]) -> list[TextToken]:
        return [] if self.tokens is None else self.tokens.take(parts, tokens)

    def _put(self, part: AnswerPart, logprobs: list[TextToken]) -> list[TextToken]:
        """Add them to the text that the part was just added to; returns those that are left, if the part isn't text."""
        last = self.items[-1]
        if not isinstance(part, AnswerText) or not isinstance(last, OutputMessage):
            return logprobs
        last.content[0].logprobs += logprobs
        return []

    def _finish_items(self, last: str) -> None:
        for item in self.items:
            item.status = "completed"
        if self.items:
            self.items[-1].status = last  # type: ignore[assignment]

    @staticmethod
    def _cut(answer: CollectedAnswer) -> bool:
        return answer.done is not None and answer.done.finish == "length"

    # ---- events ------------------------------------------------------------------------------------------

    def _event(self, kind: str, **what: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self._number, **what}
        self._number += 1
        return event

    def _events(self, parts: Sequence[AnswerPart], tokens: Sequence[GeneratedToken]) -> list[dict[str, Any]]:
        logprobs = self._logprobs(parts, tokens)
        events: list[dict[str, Any]] = []
        for part in parts:
            events += self._part_events(part, logprobs)
            logprobs = self._put(part, logprobs)
        return events

    def _part_events(self, part: AnswerPart, logprobs: list[TextToken]) -> Iterator[dict[str, Any]]:
        if isinstance(part, CallStart) or not self.items or not isinstance(self.items[-1], _KINDS[type(part)]):
            yield from self._close("completed")
        new = self._take(part)
        item, at = self.items[-1], {"output_index": len(self.items) - 1, "item_id": self.items[-1].id}
        if new:
            empty = item.model_dump()
            if not isinstance(item, OutputCall):
                empty["content"] = []
            yield self._event("response.output_item.added", output_index=at["output_index"], item=empty)
            if not isinstance(item, OutputCall):
                piece = {**item.content[0].model_dump(), "text": ""}  # so far only its text is set
                yield self._event("response.content_part.added", **at, content_index=0, part=piece)
        if isinstance(part, CallArguments):
            yield self._event("response.function_call_arguments.delta", **at, delta=part.text)
        elif isinstance(part, AnswerText):
            yield self._event(
                "response.output_text.delta", **at, content_index=0, delta=part.text, logprobs=_plain(logprobs)
            )
        elif isinstance(part, ThinkingText):
            yield self._event("response.reasoning_text.delta", **at, content_index=0, delta=part.text)

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        """End the item that is in progress."""
        if not self.items or self.items[-1].status != "in_progress":
            return
        item, at = self.items[-1], {"output_index": len(self.items) - 1, "item_id": self.items[-1].id}
        item.status = status  # type: ignore[assignment]
        if isinstance(item, OutputCall):
            done = {"name": item.name, "arguments": item.arguments}
            yield self._event("response.function_call_arguments.done", **at, **done)
        else:
            text = {"content_index": 0, "text": item.content[0].text}
            if isinstance(item, OutputMessage):
                logprobs = _plain(item.content[0].logprobs)
                yield self._event("response.output_text.done", **at, **text, logprobs=logprobs)
            else:
                yield self._event("response.reasoning_text.done", **at, **text)
            part = item.content[0].model_dump()
            yield self._event("response.content_part.done", **at, content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=at["output_index"], item=item.model_dump())

    def _response(self, prepared: Prepared | None = None, answer: CollectedAnswer | None = None) -> dict[str, Any]:
        """The response so far; with an answer, the final response."""
        request = self.request
        usage = summary = None
        if prepared is not None and answer is not None and answer.done is not None:
            read, made = sum(prepared.lengths), answer.done.tokens
            usage = ResponseUsage(
                input_tokens=read,
                output_tokens=made,
                output_tokens_details=OutputDetails(reasoning_tokens=answer.thought_tokens),
                total_tokens=read + made,
            )
            summary = summary_of(prepared, [answer])
        cut = answer is not None and self._cut(answer)
        dumped = request.model_dump(by_alias=True, exclude_unset=True)
        return ResponseObject(
            id=self.id,
            created_at=self.created,
            model=request.model,
            status="in_progress" if usage is None else "incomplete" if cut else "completed",
            incomplete_details=Incomplete() if cut else None,
            output=self.items,
            usage=usage,
            instructions=request.instructions,
            tools=dumped.get("tools") or [],
            tool_choice=dumped.get("tool_choice") or "auto",
            parallel_tool_calls=request.parallel_tool_calls is not False,
            text={"format": {"type": "text"}, **(dumped.get("text") or {})},
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            user=request.user,
            trimtab=summary,
        ).model_dump()


_KINDS: dict[type, type] = {
    AnswerText: OutputMessage,
    ThinkingText: OutputReasoning,
    CallArguments: OutputCall,
}
"""The type of item that each part belongs to."""
