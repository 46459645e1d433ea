"""Answers in their wire format, whole or in chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.serve.monitored import in_chunk
from trimtab.serve.monitored import readings_of as read_by_monitors
from trimtab.serve.refusals import Refusal
from trimtab.serve.schema_output import (
    AnswerReport,
    CalledFunction,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Completion,
    DoseReport,
    PromptDetails,
    RejectionReport,
    SteeringReport,
    TextChoice,
    TextLogprobs,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Usage,
)
from trimtab.serve.service import Prepared
from trimtab.serve.tasks import Done, GeneratedToken, Piece, total_dose
from trimtab.steering.monitors import Monitor
from trimtab.text.answer_parts import AnswerPart, AnswerSplitter, AnswerText, CallArguments, CallStart, ThinkingText
from trimtab.text.template_answer_parts import TemplateSplitter
from trimtab.text.token_bytes import token_bytes

LOWEST = -9999.0  # what OpenAI's API reports for a probability of 0, for whose logarithm JSON has no number


def new_id(chat: bool) -> str:
    """A new id for a completion."""
    return f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"


@dataclass
class CollectedAnswer:
    """One answer so far. `parser` parses its text into the parts in `parts`.

    `parts_by_event` has the same parts by event: those that each event completed, with the event's tokens.
    """

    text: str = ""
    tokens: list[GeneratedToken] = field(default_factory=list)
    done: Done | None = None
    parser: AnswerSplitter | TemplateSplitter | None = None
    parts: list[AnswerPart] = field(default_factory=list)
    parts_by_event: list[tuple[list[AnswerPart], tuple[GeneratedToken, ...]]] = field(default_factory=list)
    thought_tokens: int = 0

    def take(self, event: Piece | Done) -> list[AnswerPart]:
        """Add a piece or the end; returns the parts that it completes."""
        if isinstance(event, Done):
            self.done = event
            more = self.parser.finish() if self.parser is not None else []
        else:
            self.text += event.text
            self.tokens += event.tokens
            if self.parser is not None and self.parser.in_thinking:
                self.thought_tokens += len(event.tokens)
            more = self.parser.add(event.text) if self.parser is not None else [AnswerText(event.text)]
        self.parts += more
        self.parts_by_event.append((more, () if isinstance(event, Done) else event.tokens))
        return more

    @property
    def words(self) -> str:
        """The text for the reader."""
        return "".join(part.text for part in self.parts if isinstance(part, AnswerText))

    @property
    def thought(self) -> str:
        """The thinking."""
        return "".join(part.text for part in self.parts if isinstance(part, ThinkingText))

    @property
    def calls(self) -> list[ToolCall]:
        """The tool calls."""
        calls = []
        for part in self.parts:
            if isinstance(part, CallStart):
                calls.append(ToolCall(id=part.id, function=CalledFunction(name=part.name, arguments="")))
            elif isinstance(part, CallArguments):
                calls[-1].function.arguments += part.text
        return calls

    @property
    def finish_reason(self) -> Any:
        """The finish reason."""
        assert self.done is not None
        return self.done.finish

    @property
    def chat_finish_reason(self) -> Any:
        """The finish reason in a chat."""
        calls = any(isinstance(part, CallStart) for part in self.parts)
        return "tool_calls" if calls and self.finish_reason == "stop" else self.finish_reason


@dataclass(frozen=True)
class Wire:
    """Writes one request's answers: `id`, model, whether it is a chat, and whether log-probabilities are included."""

    id: str
    model: str
    chat: bool
    logprobs: bool
    tokenizer: Any
    monitors: tuple[Monitor, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, prepared: Prepared, answers: Sequence[CollectedAnswer]) -> dict[str, Any]:
        """The response to a request that doesn't stream."""
        summary, usage = summary_of(prepared, answers), self.usage(prepared, answers)
        head: dict[str, Any] = {"id": self.id, "created": self.created, "model": self.model, "usage": usage}
        if self.chat:
            chosen = [
                ChatChoice(
                    index=i,
                    message=_message(answer),
                    logprobs=self._chat_logprobs(answer.tokens),
                    finish_reason=answer.chat_finish_reason,
                )
                for i, answer in enumerate(answers)
            ]
            response = ChatCompletion(choices=chosen, trimtab=summary, **head).model_dump()
            for choice in response["choices"]:
                for name in ("reasoning_content", "tool_calls"):  # absent in plain answers
                    if choice["message"][name] is None:
                        del choice["message"][name]
            return response
        texts = [
            TextChoice(
                index=i,
                text=answer.text,
                logprobs=self._text_logprobs(answer.tokens, 0),
                finish_reason=answer.finish_reason,
            )
            for i, answer in enumerate(answers)
        ]
        return Completion(choices=texts, trimtab=summary, **head).model_dump()

    def opening(self, index: int) -> list[dict[str, Any]]:
        """An answer's first chunk in a chat stream, with the role."""
        return [self._chunk(index, {"role": "assistant", "content": ""}, None, None)] if self.chat else []

    def piece(self, index: int, piece: Piece, parts: Sequence[AnswerPart], before: int) -> list[dict[str, Any]]:
        """The chunks for a piece that begins at character `before` of the answer; the first has the piece's tokens."""
        read = in_chunk(self.monitors, piece.tokens)
        if not self.chat:
            text_logprobs = self._text_logprobs(piece.tokens, before)
            return [self._chunk(index, {"text": piece.text}, text_logprobs and text_logprobs.model_dump(), None) | read]
        logprobs = self._chat_logprobs(piece.tokens)
        dumped = logprobs and logprobs.model_dump()
        deltas = [_delta(part) for part in parts] or ([{"content": ""}] if dumped or read else [])
        chunks = [self._chunk(index, delta, None if n else dumped, None) for n, delta in enumerate(deltas)]
        return [chunk if n else chunk | read for n, chunk in enumerate(chunks)]

    def ending(self, index: int, answer: CollectedAnswer, parts: Sequence[AnswerPart]) -> list[dict[str, Any]]:
        """The chunks for the rest of the answer; the last has the finish reason."""
        assert answer.done is not None
        if not self.chat:
            return [self._chunk(index, {"text": ""}, None, answer.done.finish)]
        rest = [self._chunk(index, _delta(part), None, None) for part in parts]
        return [*rest, self._chunk(index, {}, None, answer.chat_finish_reason)]

    def last(self, prepared: Prepared, answers: Sequence[CollectedAnswer], usage: bool) -> dict[str, Any]:
        """The chunk after all answers: what was applied, and the usage if requested."""
        chunk: dict[str, Any] = {**self._head(), "choices": [], "trimtab": summary_of(prepared, answers).model_dump()}
        return {**chunk, "usage": self.usage(prepared, answers).model_dump()} if usage else chunk

    def usage(self, prepared: Prepared, answers: Sequence[CollectedAnswer]) -> Usage:
        """The tokens of the prompts and of all answers."""
        prompt = sum(prepared.lengths)
        made = sum(answer.done.tokens for answer in answers if answer.done)
        each = max(1, len(answers) // max(1, len(prepared.lengths)))  # per prompt, whose tokens count once
        cached = sum(answer.done.cached for answer in answers[::each] if answer.done)
        details = PromptDetails(cached_tokens=cached)
        return Usage(
            prompt_tokens=prompt, completion_tokens=made, total_tokens=prompt + made, prompt_tokens_details=details
        )

    def failed(self, refusal: Refusal) -> list[dict[str, Any]]:
        """The last chunk of a stream that failed."""
        return [refusal.body]

    def encode(self, chunk: dict[str, Any]) -> bytes:
        return event(chunk)

    @property
    def end(self) -> bytes:
        """The end of a stream."""
        return END

    def _head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        inner: dict[str, Any] = {"delta": delta} if self.chat else delta
        choice = {"index": index, **inner, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head(), "choices": [choice]}

    def _chat_logprobs(self, tokens: Sequence[GeneratedToken]) -> ChatLogprobs | None:
        if not self.logprobs:
            return None
        content = []
        for token in tokens:
            top = [TopLogprob(**token_entry(self.tokenizer, id, value)) for id, value in token.likeliest]
            content.append(TokenLogprob(**token_entry(self.tokenizer, token.id, token.logprob), top_logprobs=top))
        return ChatLogprobs(content=content)

    def _text_logprobs(self, tokens: Sequence[GeneratedToken], before: int) -> TextLogprobs | None:
        if not self.logprobs:
            return None
        texts = [self._text(token.id) for token in tokens]
        offsets, at = [], before
        for text in texts:
            offsets.append(at)
            at += len(text)
        top = [{self._text(id): _finite(value) for id, value in token.likeliest} for token in tokens]
        values = [_finite(token.logprob) for token in tokens]
        return TextLogprobs(tokens=texts, token_logprobs=values, top_logprobs=top, text_offset=offsets)

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def token_entry(tokenizer: Any, token: int, logprob: float | None) -> dict[str, Any]:
    """A token's entry in log-probabilities: its text, its bytes (`None` if unknown) and its log-probability."""
    text = str(tokenizer.decode([token]))
    data = text.encode() if "\ufffd" not in text else token_bytes(tokenizer, token)  # part of a character
    return {"token": text, "logprob": _finite(logprob), "bytes": None if data is None else list(data)}


def event(chunk: dict[str, Any]) -> bytes:
    """A chunk as a server-sent event."""
    return b"data: " + json.dumps(chunk, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


END = b"data: [DONE]\n\n"


def summary_of(prepared: Prepared, answers: Sequence[CollectedAnswer]) -> SteeringReport:
    """What steered these answers, and the parts of their schemas that weren't enforced."""
    per_answer = [
        _applied(i, answer.done).model_copy(
            update={"monitors": read_by_monitors(prepared.tasks[i].monitors, answer.done)}
        )
        for i, answer in enumerate(answers)
        if answer.done
    ]
    grammar = prepared.shape.grammar
    unenforced = list(grammar.ignored) if grammar is not None else []
    return SteeringReport(
        steering=prepared.steerings, emphasized_tokens=prepared.emphasized, answers=per_answer, unheld=unenforced
    )


def _message(answer: CollectedAnswer) -> ChatMessage:
    words, calls = answer.words, answer.calls
    return ChatMessage(
        content=words or (None if calls else ""), reasoning_content=answer.thought or None, tool_calls=calls or None
    )


def _delta(part: AnswerPart) -> dict[str, Any]:
    """A part as a delta of a message."""
    if isinstance(part, AnswerText):
        return {"content": part.text}
    if isinstance(part, ThinkingText):
        return {"reasoning_content": part.text}
    if isinstance(part, CallStart):
        function = {"name": part.name, "arguments": ""}
        return {"tool_calls": [{"index": part.index, "id": part.id, "type": "function", "function": function}]}
    return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}


def _finite(value: float | None) -> float:
    return LOWEST if value is None or not value > LOWEST else value


def _applied(index: int, done: Done) -> AnswerReport:
    doses = [DoseReport(layer=d.layer, kind=d.kind, ratio=d.ratio, tokens=d.tokens) for d in done.applied.doses]
    rejection = None
    if done.trace is not None:
        steps = done.trace.steps
        opened = [step for step in steps if step.open]
        rejection = RejectionReport(
            tokens=len(steps),
            open=len(opened),
            steered=sum(step.candidate == 0 for step in opened),
            weakened=sum(bool(step.candidate) for step in opened),
            rejected=sum(step.candidate is None for step in opened),
            changed=sum(step.replaced is not None for step in steps),
        )
    measured = done.trace is None  # doses aren't, with rejection
    return AnswerReport(
        index=index,
        edits=list(done.applied.edits),
        dose=done.applied.dose if measured else None,
        total_dose=total_dose(done.applied) if measured else None,
        doses=doses,
        rejection=rejection,
    )
