"""Splits a streamed answer into parts with transformers' parser and the tokenizer's response template.

Such a template defines the regions of a model's answer: thinking, text, and tool calls in the model's own form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trimtab.text.answer_parts import AnswerPart, AnswerText, CallArguments, CallStart, ThinkingText, new_call_id

THINKING = ("thinking", "reasoning", "reasoning_content")
"""The names of the thinking region in templates."""


def has_response_template(tokenizer: Any) -> bool:
    """Whether transformers can parse this model's answers."""
    return bool(getattr(tokenizer, "response_template", None)) and hasattr(tokenizer, "get_response_parser")


class TemplateSplitter:
    """Splits one answer, like `Parts`. `prompt` are the ids before it, `tools` the tools that may be called."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._parser: Any = tokenizer.get_response_parser(prefix=list(prompt), tools=[*tools] or None)
        self._region = ""
        self._calls = 0
        # trailing whitespace so far, which isn't part of a region if it turns out to be its end
        self._trailing_whitespace: dict[str, str] = {}
        self._started: set[str] = set()
        list(self._parts(self._parser.initial_events))

    @property
    def in_thinking(self) -> bool:
        """Whether the text that comes next is thinking, as far as is known."""
        return self._region in THINKING

    def add(self, text: str) -> list[AnswerPart]:
        """The parts that are complete with this piece."""
        return self._read(lambda: self._parser.feed(text), text)

    def finish(self) -> list[AnswerPart]:
        """The remaining parts."""
        return self._read(lambda: self._parser.finalize()[1], "")

    def _read(self, next_events: Any, text: str) -> list[AnswerPart]:
        if self._parser is None:
            return [AnswerText(text)] if text else []
        try:
            events = next_events()
        except ValueError:  # a region that doesn't match the template: the rest is treated as text
            self._parser = None
            return [AnswerText(text)] if text else []
        return list(self._parts(events))

    def _parts(self, events: Sequence[Mapping[str, Any]]) -> Iterator[AnswerPart]:
        for event in events:
            field = event["field"]
            if event["type"] == "region_open":
                self._region = field
                self._trailing_whitespace[field] = ""
                self._started.discard(field)
            elif event["type"] == "region_chunk":
                kind = ThinkingText if field in THINKING else AnswerText if field == "content" else None
                if kind is not None:
                    yield from self._text(field, event["text"], kind)
            else:
                self._region = ""
                if field == "tool_calls":
                    yield from self._call_parts(event["value"])

    def _text(self, field: str, text: str, kind: type[AnswerText] | type[ThinkingText]) -> Iterator[AnswerPart]:
        pending = self._trailing_whitespace[field] + text
        if field not in self._started:
            pending = pending.lstrip()
        ready = pending.rstrip()
        self._trailing_whitespace[field] = pending[len(ready) :]
        if ready:
            self._started.add(field)
            yield kind(ready)

    def _call_parts(self, value: Any) -> Iterator[AnswerPart]:
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function", call) if isinstance(call, Mapping) else {}
            if not isinstance(function.get("name"), str):
                continue
            arguments = function.get("arguments", {})
            yield CallStart(self._calls, new_call_id(), function["name"])
            yield CallArguments(self._calls, arguments if isinstance(arguments, str) else json.dumps(arguments))
            self._calls += 1
