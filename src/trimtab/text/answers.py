"""Pairs of answers to token ids, and the tokens of an answer at which activations are read.

A marker is looked up in the answer's text, and the tokenizer's offsets say which tokens come after it. Token sequences
are never searched for the marker's tokens, since at its edges a marker may be merged with the adjacent text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.text.chat import encode, render_messages, warn_of_special_tokens
from trimtab.text.letters import LetterQuestion, ids_of, letter_question
from trimtab.text.pairs import Pair, Side, as_prompt, sides

Kind = Literal["last", "answer", "first", "after"]
SHOWN = 60
MARK = "trimtab\u2060asks"


@dataclass(frozen=True)
class ReadAt:
    """Where an answer is read: at its last token, or at several, over whose activations the mean is taken.

    `"last"` is the last token, `"answer"` all of them, `"first"` the first `count` (or all, if there are fewer), and
    `"after"` those after the first occurrence of the text `marker`, such as `</think>`.

    Raises `TrimtabError` for an unknown kind, a count below 1, and an empty marker.
    """

    kind: Kind = "last"
    count: int | None = None
    marker: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise TrimtabError(f"an answer is read at {', '.join(get_args(Kind))}, got {self.kind!r}")
        if (self.kind == "first") != (self.count is not None) or (self.kind == "after") != (self.marker is not None):
            raise TrimtabError("'first' needs a count, and 'after' a marker; nothing else takes one")
        if self.count is not None and (isinstance(self.count, bool) or self.count < 1):
            raise TrimtabError(f"the number of first tokens must be 1 or more, got {self.count!r}")
        if self.marker is not None and not self.marker:
            raise TrimtabError("the marker after which an answer is read is empty; give a text such as </think>")

    @classmethod
    def parse(cls, text: str) -> ReadAt:
        r"""From the command line: `last`, `answer`, `first:K` or `after:MARKER`.

        A marker in double quotes is parsed as a JSON string: `after:"\n\n"` is an empty line. Any other is taken
        literally. Raises `TrimtabError` for anything else.
        """
        if not isinstance(text, str):
            raise TrimtabError(f"read_at is a text, last, answer, first:K or after:MARKER, got {text!r}")
        kind, colon, rest = text.partition(":")
        if kind == "after" and colon:
            return cls("after", marker=_unquoted(rest))
        if kind == "first" and rest.isascii() and rest.isdecimal():
            return cls("first", count=int(rest))
        if not colon and kind in ("last", "answer"):
            return cls(kind)  # type: ignore[arg-type]
        raise TrimtabError(f"an answer can't be read at {text!r}; use last, answer, first:K or after:MARKER")

    def __str__(self) -> str:
        """The text that `parse` reads."""
        if self.marker is not None:
            plain = self.marker.isprintable() and self.marker == self.marker.strip() and self.marker[0] != '"'
            return f"after:{self.marker if plain else json.dumps(self.marker)}"
        return self.kind if self.count is None else f"first:{self.count}"


LAST = ReadAt()


def as_read_at(value: str | ReadAt) -> ReadAt:
    """A `ReadAt`, parsed if it is a string. Raises `TrimtabError` as `ReadAt.parse` does."""
    return value if isinstance(value, ReadAt) else ReadAt.parse(value)


def check_read_at(value: str | ReadAt | None, shape: str) -> ReadAt | None:
    """Where to read pairs of this shape, if specified. Raises `TrimtabError` for letters, and as `as_read_at` does."""
    if value is not None and shape == "letters":
        raise TrimtabError("multiple-choice answers are read at their letter; leave out read_at (--read-at)")
    return None if value is None else as_read_at(value)


@dataclass(frozen=True)
class EncodedSide:
    """One side of a pair as token ids, of which those from `start` on are the answer, and the answer's text.

    A bare text is all answer, and its ids may include tokens that aren't part of the text, such as a BOS token.
    """

    ids: tuple[int, ...]
    start: int
    answer: str


def encode_sides(tokenizer: Any, pair: Pair) -> tuple[EncodedSide, EncodedSide]:
    """The positive and the negative side of a pair of answers or texts.

    Raises `TrimtabError` for pairs of another shape, an answer without tokens, a system prompt that the chat template
    drops, and as `encode` does.
    """
    if pair.shape not in ("answers", "texts"):
        raise TrimtabError(f"these are pairs of {pair.shape}, not of answers or texts")
    positive, negative = (_encoded(tokenizer, pair, side) for side in sides(pair))
    return positive, negative


def encode_prompt(tokenizer: Any, side: Side) -> list[int]:
    """The token ids of a side's prompt, under its system prompt, ending where the answer begins.

    Raises `TrimtabError` for a system prompt that the chat template drops, and as `encode` does.
    """
    ids = encode(tokenizer, as_prompt(side.prompt), system=side.system)
    _check_system_rendered(tokenizer, side)
    return ids


def side_question(tokenizer: Any, side: Side, letters: Sequence[str]) -> LetterQuestion:
    """A multiple-choice question under the side's system prompt.

    Raises `TrimtabError` for a system prompt that the chat template drops, and as `letter_question` does.
    """
    assert isinstance(side.prompt, str)  # a pair of letters has no messages
    question = letter_question(tokenizer, side.prompt, letters, system=side.system)
    _check_system_rendered(tokenizer, side)
    return question


def _check_system_rendered(tokenizer: Any, side: Side) -> None:
    """Raises `TrimtabError` if another system prompt renders the same, which means that the template drops it."""
    turns_given = (("user", side.prompt),) if isinstance(side.prompt, str) else side.prompt
    turns_given = turns_given if side.system is None else (("system", side.system), *turns_given)
    if not any(role == "system" for role, _ in turns_given):
        return
    altered = tuple((role, f"{content} {MARK}" if role == "system" else content) for role, content in turns_given)
    rendered, rendered_altered = (
        render_messages(tokenizer, [{"role": r, "content": c} for r, c in turns]) for turns in (turns_given, altered)
    )
    if rendered == rendered_altered:
        raise TrimtabError("the chat template drops system prompts; put the text into the prompt")


def read_positions(tokenizer: Any, text: EncodedSide, read_at: ReadAt = LAST) -> Sequence[int]:
    """The positions at which an answer is read; for a bare text, its own tokens (with `"last"`, the last of all ids).

    Args:
        tokenizer: The tokenizer that made the ids.
        text: A side from `encode_sides`.
        read_at: Where to read.

    Raises:
        TrimtabError: The marker isn't in the answer, or nothing comes after it.
        UnsupportedError: The tokenizer has no offsets, or its special tokens can't be separated from the text's.
    """
    if read_at.kind == "last":
        return [len(text.ids) - 1]
    start, stop = _answer_span(tokenizer, text)
    if read_at.marker is not None:
        return [start + i for i in _tokens_after_marker(tokenizer, text.answer, read_at.marker)]
    return range(start, stop if read_at.count is None else min(stop, start + read_at.count))


def _encoded(tokenizer: Any, pair: Pair, side: Side) -> EncodedSide:
    if pair.shape == "texts":
        opening, ids = [], encode(tokenizer, side.answer, chat=False)
    else:
        opening, ids = encode_prompt(tokenizer, side), ids_of(tokenizer, side.answer)
        warn_of_special_tokens(tokenizer, side.answer, answer=True)
    if not ids:
        raise TrimtabError(f"an answer is empty: {side.answer!r} has no tokens")
    return EncodedSide((*opening, *ids), len(opening), side.answer)


def _answer_span(tokenizer: Any, text: EncodedSide) -> tuple[int, int]:
    """The range of the answer's own tokens, without special tokens that a tokenizer puts around a text."""
    if text.start:
        return text.start, len(text.ids)
    own = ids_of(tokenizer, text.answer)
    for start in range(len(text.ids) - len(own) + 1):
        if own and list(text.ids[start : start + len(own)]) == own:
            return start, start + len(own)
    raise UnsupportedError(
        f"this tokenizer's tokens for {_shorten(text.answer)!r} differ with and without special tokens"
    )


def _tokens_after_marker(tokenizer: Any, answer: str, marker: str) -> list[int]:
    """The answer's tokens after the first marker: those that contain none of it except trailing whitespace.

    A tokenizer may merge that whitespace with the word that follows, and the word is what is wanted.
    """
    place = answer.find(marker)
    if place < 0:
        raise TrimtabError(f"the answer has no {marker!r} in it: {_shorten(answer)!r}")
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError("this tokenizer can't map tokens to characters; load its fast version")
    end = place + len(marker)
    offsets = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    after = [i for i, (a, b) in enumerate(offsets) if b > end and not answer[a:end].strip()]
    if not after:
        raise TrimtabError(f"nothing comes after {marker!r} in the answer: {_shorten(answer, end=True)!r}")
    return after


def _unquoted(marker: str) -> str:
    if not marker.startswith('"'):
        return marker
    try:
        return str(json.loads(marker))
    except ValueError:
        raise TrimtabError(f"the marker {marker} begins with a quote but isn't a JSON string") from None


def _shorten(text: str, *, end: bool = False) -> str:
    if len(text) <= SHOWN:
        return text
    return f"… {text[-SHOWN:]}" if end else f"{text[:SHOWN]} …"
