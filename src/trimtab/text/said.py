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
from trimtab.text.unfolding import overlap


@dataclass(frozen=True)
class Words:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class Thought:
    """Text between the markers of thinking."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """The beginning of a tool call; `index` counts the calls of this answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next part of a call's arguments, in JSON."""

    index: int
    text: str


Part = Words | Thought | CallBegun | CallArguments
STRING = r'"(?:[^"\\]|\\.)*"'


@dataclass(frozen=True)
class Marks:
    """The markers in an answer's text.

    `thinking` are the texts that open and close it; `begun` says that the prompt has opened it already. `calls` is the
    form that calls are written in. With `strict`, calls follow the form, as enforced by a grammar; otherwise a call
    that names none of `tools`, or isn't JSON, counts as text.
    """

    thinking: tuple[str, str] | None = None
    begun: bool = False
    calls: CallForm | None = None
    tools: Collection[str] = ()
    strict: bool = False


class Parts:
    """Splits one answer. Call `add` with each piece of its text, and `finish` at its end; both return parts."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks
        self.calls = 0
        self._held = ""
        self._fresh = True  # whitespace from here on is dropped
        self._depth, self._quoted, self._escaped = 0, False, False  # in a call's arguments
        self._state = self._opening
        if marks.thinking is None:
            self._to_words(fresh=False)
        elif marks.begun:
            self._state = self._thinking

    @property
    def thinks(self) -> bool:
        """Whether the text that comes next is thinking, as far as is known."""
        return self._state == self._thinking

    def add(self, text: str) -> list[Part]:
        """The parts that are complete with this piece."""
        self._held += text
        return list(self._run(last=False))

    def finish(self) -> list[Part]:
        """The remaining parts."""
        return list(self._run(last=True))

    def _run(self, last: bool) -> Iterator[Part]:
        while True:
            before = self._state, len(self._held)
            yield from self._state(last)
            if (self._state, len(self._held)) == before:
                return

    def _until(self, marker: str, last: bool) -> tuple[str, bool]:
        """The text up to a marker, and whether it has come. A possible beginning of it, with spaces before, is held
        back.
        """
        if self._fresh:
            self._held = self._held.lstrip()
            self._fresh = not self._held
        text, matched, rest = self._held.partition(marker)
        if matched:
            self._held = rest
            return text.rstrip(), True
        if last:
            self._held = ""
            return text, False
        shown = text[: len(text) - overlap(text, marker)].rstrip()
        self._held = text[len(shown) :]
        return shown, False

    # ---- thinking and words ------------------------------------------------------------------------------

    def _opening(self, last: bool) -> Iterator[Part]:
        """Before any text but whitespace: thinking may begin."""
        assert self.marks.thinking is not None
        opens, text = self.marks.thinking[0], self._held.lstrip()
        if text.startswith(opens):
            self._held = text[len(opens) :]
            self._state = self._thinking
        elif last or (text and not opens.startswith(text)):
            self._to_words(fresh=False)
        yield from ()

    def _thinking(self, last: bool) -> Iterator[Part]:
        assert self.marks.thinking is not None
        text, over = self._until(self.marks.thinking[1], last)
        if text := text.rstrip() if last else text:
            yield Thought(text)
        if over:
            self._to_words(fresh=True)

    def _to_words(self, fresh: bool) -> None:
        form = self.marks.calls
        self._fresh = fresh
        self._state = self._words
        if form is not None and form.alone:
            self._state = self._begun if self.marks.strict else self._whole

    def _words(self, last: bool) -> Iterator[Part]:
        form = self.marks.calls
        if form is None and not self._fresh:
            text, opened = self._held, False
            self._held = ""
        else:
            text, opened = self._until(form.opens if form is not None and form.opens else "\0", last)
        if text:
            yield Words(text)
        if opened:
            self._state = self._begun

    def _whole(self, last: bool) -> Iterator[Part]:
        """An answer that is either one or more calls as a whole, or text; only its end decides."""
        text = self._held.lstrip()
        if text and not text.startswith("{"):
            self._state = self._words
            return
        if not last:
            return
        calls = _calls_in(text, self.marks.tools)
        for name, arguments in calls:
            yield from self._call(name)
            yield CallArguments(self.calls - 1, arguments)
        if not calls and self._held:
            yield Words(self._held)
        self._held = ""

    # ---- calls -------------------------------------------------------------------------------------------

    def _call(self, name: str) -> Iterator[Part]:
        self.calls += 1
        yield CallBegun(self.calls - 1, new_call_id(), name)

    def _begun(self, last: bool) -> Iterator[Part]:
        """Until the name is known, and the arguments begin."""
        form = self.marks.calls
        assert form is not None
        match = (HEAD if form.before else HEAD_ARGS).match(self._held)
        if match is not None:
            yield from self._call(json.loads(match[1]) if form.before else match[1])
            self._held = self._held[match.end() :]
            self._state = self._arguments
        elif last:
            if text := form.opens + self._held:
                yield Words(text)
            self._held, self._state = "", self._words

    def _arguments(self, last: bool) -> Iterator[Part]:
        """One JSON object, passed on verbatim."""
        for place, letter in enumerate(self._held):
            if self._quoted:
                self._quoted = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
                continue
            self._quoted = letter == '"'
            self._depth += (letter in "{[") - (letter in "}]")
            if self._depth == 0:
                shown, self._held = self._held[: place + 1], self._held[place + 1 :]
                self._state = self._ended
                break
        else:
            shown, self._held = self._held, ""
        if shown:
            yield CallArguments(self.calls - 1, shown)

    def _ended(self, last: bool) -> Iterator[Part]:
        """After a call's arguments."""
        form = self.marks.calls
        assert form is not None
        if form.many == "list":
            if match := re.match(r"\s*\}\s*([],])", self._held):
                self._held = self._held[match.end() :]
                self._fresh, self._state = True, self._begun if match[1] == "," else self._words
        elif form.closes:
            _, closed = self._until(form.closes, last)
            if closed:
                self._fresh, self._state = True, self._words
        elif form.before:
            self._held = ""  # the answer was only the call
        else:
            self._fresh, self._state = True, self._words
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
