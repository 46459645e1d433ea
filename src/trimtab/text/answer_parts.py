"""Splits a streamed answer into its parts: thinking, text for the reader, and tool calls.

Pieces of text go in, parts come out. Text that may be the beginning of a marker is held back until that is decided, and
so is the whitespace around thinking, which isn't part of it. The arguments of a call are passed on verbatim: they are
JSON that is neither parsed nor serialized again.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from trimtab.text.calls import CallForm
from trimtab.text.detokenizer import overlap


@dataclass(frozen=True)
class AnswerText:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class ThinkingText:
    """Text between the markers of thinking."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """The beginning of a tool call; `index` counts the calls of this answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next part of a call's arguments, in JSON."""

    index: int
    text: str


AnswerPart = AnswerText | ThinkingText | CallStart | CallArguments
STRING = r'"(?:[^"\\]|\\.)*"'


@dataclass(frozen=True)
class AnswerMarkers:
    """The markers in an answer's text.

    `thinking` are the texts that open and close it; `thinking_open` says that the prompt has opened it already. `calls`
    is the form that calls are written in. With `strict`, calls follow the form, as enforced by a grammar; otherwise a
    call that names none of `tools`, or isn't JSON, counts as text.
    """

    thinking: tuple[str, str] | None = None
    thinking_open: bool = False
    calls: CallForm | None = None
    tools: Collection[str] = ()
    strict: bool = False


class AnswerSplitter:
    """Splits one answer. Call `add` with each piece of its text, and `finish` at its end; both return parts."""

    def __init__(self, marks: AnswerMarkers) -> None:
        self.marks = marks
        self.calls = 0
        self._pending = ""
        self._skip_whitespace = True  # whitespace from here on is dropped
        self._depth, self._in_string, self._escaped = 0, False, False  # in a call's arguments
        self._state = self._opening
        if marks.thinking is None:
            self._enter_text(skip_whitespace=False)
        elif marks.thinking_open:
            self._state = self._thinking

    @property
    def in_thinking(self) -> bool:
        """Whether the text that comes next is thinking, as far as is known."""
        return self._state == self._thinking

    def add(self, text: str) -> list[AnswerPart]:
        """The parts that are complete with this piece."""
        self._pending += text
        return list(self._run(last=False))

    def finish(self) -> list[AnswerPart]:
        """The remaining parts."""
        return list(self._run(last=True))

    def _run(self, last: bool) -> Iterator[AnswerPart]:
        while True:
            before = self._state, len(self._pending)
            yield from self._state(last)
            if (self._state, len(self._pending)) == before:
                return

    def _until(self, marker: str, last: bool) -> tuple[str, bool]:
        """The text up to a marker, and whether it has come. A possible beginning of it, with spaces before, is held
        back.
        """
        if self._skip_whitespace:
            self._pending = self._pending.lstrip()
            self._skip_whitespace = not self._pending
        text, matched, rest = self._pending.partition(marker)
        if matched:
            self._pending = rest
            return text.rstrip(), True
        if last:
            self._pending = ""
            return text, False
        ready = text[: len(text) - overlap(text, marker)].rstrip()
        self._pending = text[len(ready) :]
        return ready, False

    # ---- thinking and words ------------------------------------------------------------------------------

    def _opening(self, last: bool) -> Iterator[AnswerPart]:
        """Before any text but whitespace: thinking may begin."""
        assert self.marks.thinking is not None
        opens, text = self.marks.thinking[0], self._pending.lstrip()
        if text.startswith(opens):
            self._pending = text[len(opens) :]
            self._state = self._thinking
        elif last or (text and not opens.startswith(text)):
            self._enter_text(skip_whitespace=False)
        yield from ()

    def _thinking(self, last: bool) -> Iterator[AnswerPart]:
        assert self.marks.thinking is not None
        text, closed = self._until(self.marks.thinking[1], last)
        if text := text.rstrip() if last else text:
            yield ThinkingText(text)
        if closed:
            self._enter_text(skip_whitespace=True)

    def _enter_text(self, skip_whitespace: bool) -> None:
        form = self.marks.calls
        self._skip_whitespace = skip_whitespace
        self._state = self._text
        if form is not None and form.is_whole_answer:
            self._state = self._call_head if self.marks.strict else self._calls_or_text

    def _text(self, last: bool) -> Iterator[AnswerPart]:
        form = self.marks.calls
        if form is None and not self._skip_whitespace:
            text, opened = self._pending, False
            self._pending = ""
        else:
            text, opened = self._until(form.opens if form is not None and form.opens else "\0", last)
        if text:
            yield AnswerText(text)
        if opened:
            self._state = self._call_head

    def _calls_or_text(self, last: bool) -> Iterator[AnswerPart]:
        """An answer that is either one or more calls as a whole, or text; only its end decides."""
        text = self._pending.lstrip()
        if text and not text.startswith("{"):
            self._state = self._text
            return
        if not last:
            return
        calls = _calls_in(text, self.marks.tools)
        for name, arguments in calls:
            yield from self._start_call(name)
            yield CallArguments(self.calls - 1, arguments)
        if not calls and self._pending:
            yield AnswerText(self._pending)
        self._pending = ""

    # ---- calls -------------------------------------------------------------------------------------------

    def _start_call(self, name: str) -> Iterator[AnswerPart]:
        self.calls += 1
        yield CallStart(self.calls - 1, new_call_id(), name)

    def _call_head(self, last: bool) -> Iterator[AnswerPart]:
        """Until the name is known, and the arguments begin."""
        form = self.marks.calls
        assert form is not None
        match = (HEAD if form.before else HEAD_ARGS).match(self._pending)
        if match is not None:
            yield from self._start_call(json.loads(match[1]) if form.before else match[1])
            self._pending = self._pending[match.end() :]
            self._state = self._arguments
        elif last:
            if text := form.opens + self._pending:
                yield AnswerText(text)
            self._pending, self._state = "", self._text

    def _arguments(self, last: bool) -> Iterator[AnswerPart]:
        """One JSON object, passed on verbatim."""
        for place, letter in enumerate(self._pending):
            if self._in_string:
                self._in_string = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
                continue
            self._in_string = letter == '"'
            self._depth += (letter in "{[") - (letter in "}]")
            if self._depth == 0:
                ready, self._pending = self._pending[: place + 1], self._pending[place + 1 :]
                self._state = self._call_tail
                break
        else:
            ready, self._pending = self._pending, ""
        if ready:
            yield CallArguments(self.calls - 1, ready)

    def _call_tail(self, last: bool) -> Iterator[AnswerPart]:
        """After a call's arguments."""
        form = self.marks.calls
        assert form is not None
        if form.multiple_calls == "list":
            if match := re.match(r"\s*\}\s*([],])", self._pending):
                self._pending = self._pending[match.end() :]
                self._skip_whitespace, self._state = True, self._call_head if match[1] == "," else self._text
        elif form.closes:
            _, closed = self._until(form.closes, last)
            if closed:
                self._skip_whitespace, self._state = True, self._text
        elif form.before:
            self._pending = ""  # the answer was only the call
        else:
            self._skip_whitespace, self._state = True, self._text
        yield from ()


def new_call_id() -> str:
    """A new random id for a call."""
    return f"call_{uuid.uuid4().hex[:24]}"


HEAD = re.compile(rf'[\s\[,]*\{{\s*"name"\s*:\s*({STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)')
HEAD_ARGS = re.compile(r"\s*([\w.-]+)\[ARGS\]\s*(?=\{)")


def _calls_in(text: str, tools: Collection[str]) -> list[tuple[str, str]]:
    """The calls that make up the whole text, with their arguments verbatim; empty if it is anything else.

    Several calls follow each other, optionally separated by a semicolon.
    """
    calls, at = [], 0
    while at < len(text.rstrip()):
        head = HEAD.match(text, at)
        if head is None or json.loads(head[1]) not in tools:
            return []
        try:
            _, end = json.JSONDecoder().raw_decode(text, head.end())
        except (ValueError, RecursionError):
            return []
        tail = re.compile(r"\s*\}\s*;?\s*").match(text, end)
        if tail is None:
            return []
        calls.append((json.loads(head[1]), text[head.end() : end]))
        at = tail.end()
    return calls
