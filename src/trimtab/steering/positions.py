"""At which tokens an edit acts: absolute positions of one request, whatever the batch looks like.

A request's tokens are numbered from 0, its prompt has `n` of them, and the token that the model
generates first stands at position `n`. The activations *at* position `n - 1` produce that first token,
so "steer the answer" usually means `Positions.from_last_prompt_token()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import TrimtabError

START, END = "start", "end"  # of the prompt


@dataclass(frozen=True, order=True)
class Bound:
    """`offset` tokens after the start of the prompt, or after its end (negative: before)."""

    anchor: str
    offset: int

    def __post_init__(self) -> None:
        if self.anchor not in (START, END):
            raise ValueError(f"a bound is anchored at {START!r} or {END!r} of the prompt, not {self.anchor!r}")
        if isinstance(self.offset, bool) or not isinstance(self.offset, int):
            raise ValueError(f"an offset is a whole number of tokens, got {self.offset!r}")
        if self.anchor == START and self.offset < 0:
            raise ValueError(f"nothing stands {-self.offset} tokens before the start of a prompt")

    def resolve(self, prompt_length: int) -> int:
        return self.offset if self.anchor == START else max(0, prompt_length + self.offset)


@dataclass(frozen=True)
class Positions:
    """A union of half-open intervals of token positions; a `None` stop means "to the end of the text"."""

    intervals: tuple[tuple[Bound, Bound | None], ...]

    @classmethod
    def all(cls) -> Positions:
        """Every token, prompt and generated."""
        return cls(((Bound(START, 0), None),))

    @classmethod
    def all_but_first(cls) -> Positions:
        """Every token but the first, which in many models is an attention sink with an outsized norm."""
        return cls(((Bound(START, 1), None),))

    @classmethod
    def prompt(cls) -> Positions:
        """Every token of the prompt, template included."""
        return cls(((Bound(START, 0), Bound(END, 0)),))

    @classmethod
    def generated(cls) -> Positions:
        """Every generated token, from the moment it is fed back."""
        return cls(((Bound(END, 0), None),))

    @classmethod
    def from_last_prompt_token(cls) -> Positions:
        """The last prompt token, which yields the first generated one, and everything after it (CAA)."""
        return cls(((Bound(END, -1), None),))

    @classmethod
    def last_prompt_token(cls) -> Positions:
        """The last prompt token only."""
        return cls(((Bound(END, -1), Bound(END, 0)),))

    @classmethod
    def window(cls, start: int, stop: int) -> Positions:
        """Generated tokens `start` to `stop` (excluded), counted from 0."""
        if not 0 <= start < stop:
            raise ValueError(f"a window of generated tokens needs 0 <= start < stop, got {start} and {stop}")
        return cls(((Bound(END, start), Bound(END, stop)),))

    @classmethod
    def first_generated(cls, k: int) -> Positions:
        """The first `k` generated tokens."""
        return cls.window(0, k)

    @classmethod
    def opening(cls, k: int) -> Positions:
        """Where the answer's first `k` tokens are made: the last prompt token and the first `k - 1` generated.

        For formats that a text holds by itself once it has begun so, such as JSON.
        """
        if k < 1:
            raise ValueError(f"an opening has one token or more, got {k}")
        return cls(((Bound(END, -1), Bound(END, k - 1)),))

    @classmethod
    def span(cls, start: int, stop: int) -> Positions:
        """Prompt tokens `start` to `stop` (excluded), counted from 0 in the rendered prompt."""
        if not 0 <= start < stop:
            raise ValueError(f"a span needs 0 <= start < stop, got {start} and {stop}")
        return cls(((Bound(START, start), Bound(START, stop)),))

    @classmethod
    def tokens(cls, indices: Sequence[int]) -> Positions:
        """These tokens of the rendered prompt, counted from 0; a negative index counts from its end, -1 is its last."""
        if not indices or any(isinstance(i, bool) or not isinstance(i, int) for i in indices):
            raise ValueError(f"tokens are named by whole numbers, at least one of them, got {list(indices)!r}")
        anchors = [(START if i >= 0 else END, i) for i in sorted(set(indices), key=lambda i: (i < 0, i))]
        return cls(tuple((Bound(anchor, i), Bound(anchor, i + 1)) for anchor, i in anchors))

    def __or__(self, other: Positions) -> Positions:
        return Positions(self.intervals + tuple(i for i in other.intervals if i not in self.intervals))

    def resolve(self, prompt_length: int) -> tuple[tuple[int, int | None], ...]:
        """Absolute `(start, stop)` pairs for a prompt of `prompt_length` tokens; empty ones are left out.

        Raises `TrimtabError` when a span reaches past the prompt, and for a token that isn't in it.
        """
        resolved = []
        for start, stop in self.intervals:
            token = _token(start, stop)
            if token is not None and not -max(1, prompt_length) <= token < prompt_length:
                named = f"{token} (span {token}:{token + 1})" if token >= 0 else token
                raise TrimtabError(
                    f"token {named} is not in the prompt, which has {prompt_length} tokens;"
                    " count the tokens of the rendered prompt, template included"
                )
            if stop is not None and stop.anchor == START and stop.offset > prompt_length:
                raise TrimtabError(
                    f"span {start.offset}:{stop.offset} is not in the prompt, which has {prompt_length} tokens;"
                    " count the tokens of the rendered prompt, template included"
                )
            low, high = start.resolve(prompt_length), None if stop is None else stop.resolve(prompt_length)
            if high is None or low < high:
                resolved.append((low, high))
        return tuple(resolved)

    def to_json(self) -> list[list[Any]]:
        return [
            [start.anchor, start.offset, *((None, None) if stop is None else (stop.anchor, stop.offset))]
            for start, stop in self.intervals
        ]

    @classmethod
    def from_json(cls, data: list[list[Any]]) -> Positions:
        return cls(tuple((Bound(a, i), None if b is None else Bound(b, j)) for a, i, b, j in data))

    def in_prompt(self, prompt_length: int) -> list[int]:
        """Which tokens of a prompt of this length are meant, in order; generated ones aren't among them.

        Raises `TrimtabError` as `resolve` does.
        """
        spans = self.resolve(prompt_length)
        return sorted({p for a, b in spans for p in range(a, prompt_length if b is None else min(b, prompt_length))})

    @classmethod
    def parse(cls, text: str) -> Positions:
        """From the command line: a name of `NAMED`, `opening:K`, `first:K`, `window:A:B`, `span:A:B`, `tokens:A,B`."""
        name, *numbers = text.split(":")
        try:
            if name == "tokens":
                (listed,) = numbers
                return cls.tokens([int(number) for number in listed.split(",")])
            if not numbers:
                return NAMED[name]
            make: dict[str, Callable[..., Positions]]
            make = {
                "opening": cls.opening,
                "first": cls.first_generated,
                "window": cls.window,
                "span": cls.span,
            }
            return make[name](*(int(number) for number in numbers))
        except (KeyError, TypeError, ValueError):
            raise TrimtabError(
                f"positions {text!r} are not known; use {', '.join(NAMED)}, opening:K, first:K, window:A:B, span:A:B or"
                " tokens:A,B"
            ) from None

    def __str__(self) -> str:
        for name, positions in NAMED.items():
            if positions == self:
                return name
        tokens = [_token(start, stop) for start, stop in self.intervals]
        if None not in tokens and len(tokens) > 1:
            return f"tokens:{','.join(map(str, tokens))}"
        return " | ".join(_interval(start, stop) for start, stop in self.intervals) or "nowhere"

    def __repr__(self) -> str:
        return f"Positions({self})"


def _token(start: Bound, stop: Bound | None) -> int | None:
    """The index of the one token of the prompt that the interval holds, if it is one."""
    if stop is None or start.anchor != stop.anchor or stop.offset != start.offset + 1:
        return None
    return start.offset if start.anchor == START or start.offset < 0 else None


def _interval(start: Bound, stop: Bound | None) -> str:
    if start.anchor == END and start.offset < -1 and (token := _token(start, stop)) is not None:
        return f"tokens:{token}"
    if stop is not None and (start, stop.anchor) == (Bound(END, -1), END):
        return f"opening:{stop.offset + 1}"
    if stop is not None and start.anchor == stop.anchor:
        return f"{'span' if start.anchor == START else 'window'}:{start.offset}:{stop.offset}"
    return f"{start.anchor}{start.offset:+d}..{'' if stop is None else f'{stop.anchor}{stop.offset:+d}'}"


NAMED = {
    "all": Positions.all(),
    "all-but-first": Positions.all_but_first(),
    "prompt": Positions.prompt(),
    "generated": Positions.generated(),
    "from-last-prompt-token": Positions.from_last_prompt_token(),
    "last-prompt-token": Positions.last_prompt_token(),
}
