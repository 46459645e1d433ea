"""The token positions at which an edit acts: absolute positions in one request, independent of batching and padding.

The tokens of a request are numbered from 0. If its prompt has `n` tokens, the first generated token is at position
`n`. The activations *at* position `n - 1` produce that first token, so "steer the answer" usually means
`Positions.from_last_prompt_token()`.

Some positions are defined by a meaning, such as `Positions.thinking()`, and depend on the generated text. All
positions combine with `|`, `&` and `~`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.keywords import check_arguments
from trimtab.steering.integers import as_int
from trimtab.steering.intervals import Intervals, complement, intersection, union
from trimtab.steering.meanings import AFTER, ANSWER, AT, OUTSIDE_TOOLS, THINKING, Meaning

START, END = "start", "end"  # of the prompt


@dataclass(frozen=True, order=True)
class Bound:
    """A position `offset` tokens after the start of the prompt, or after its end (negative: before it)."""

    anchor: str
    offset: int

    def __post_init__(self) -> None:
        if self.anchor not in (START, END):
            raise ValueError(f"a bound is anchored at {START!r} or {END!r} of the prompt, not {self.anchor!r}")
        object.__setattr__(self, "offset", _as_token_count(self.offset))
        if self.anchor == START and self.offset < 0:
            raise TrimtabError(f"there is no position {-self.offset} tokens before the start of a prompt")

    def resolve(self, prompt_length: int) -> int:
        return self.offset if self.anchor == START else max(0, prompt_length + self.offset)


@dataclass(frozen=True)
class Combined:
    """A combination of positions: `any` of the parts, `all` of them, or `not` the single part."""

    operator: str
    parts: tuple[Positions, ...]


@dataclass(frozen=True)
class Positions:
    """A union of half-open intervals of token positions, where a `None` stop means "to the end of the text".

    Instead of intervals it may have a `rule`: a meaning, or a combination of other positions.

    Examples:
        In a request whose prompt has 5 tokens, the first generated token is at position 5:

        >>> Positions.from_last_prompt_token().resolve(prompt_length=5)
        ((4, None),)
        >>> (Positions.prompt() & ~Positions.tokens([0])).in_prompt(prompt_length=5)
        [1, 2, 3, 4]
        >>> Positions.first_generated(3)
        Positions(window:0:3)
        >>> Positions.parse("thinking | first:2").meanings
        frozenset({Meaning(kind='thinking', texts=())})
    """

    intervals: tuple[tuple[Bound, Bound | None], ...] = ()
    rule: Meaning | Combined | None = None

    def __post_init__(self) -> None:
        pairs = self.intervals if isinstance(self.intervals, tuple) else (self.intervals,)
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Bound) for pair in pairs):
            parsed = isinstance(self.intervals, str)
            fix = f"Positions.parse({self.intervals!r})" if parsed else "for example Positions.tokens([2, 10])"
            raise TrimtabError(f"positions are created with a named constructor, got {self.intervals!r}; write {fix}")

    @classmethod
    def all(cls) -> Positions:
        """All tokens, of the prompt and generated."""
        return cls(((Bound(START, 0), None),))

    @classmethod
    def all_but_first(cls) -> Positions:
        """All tokens except the first, which in many models is an attention sink with an outsized norm."""
        return cls(((Bound(START, 1), None),))

    @classmethod
    def prompt(cls) -> Positions:
        """All tokens of the prompt, chat template included."""
        return cls(((Bound(START, 0), Bound(END, 0)),))

    @classmethod
    def generated(cls) -> Positions:
        """All generated tokens, each in the decode step that processes it."""
        return cls(((Bound(END, 0), None),))

    @classmethod
    def from_last_prompt_token(cls) -> Positions:
        """The last prompt token, which produces the first generated token, and all tokens after it (CAA)."""
        return cls(((Bound(END, -1), None),))

    @classmethod
    def last_prompt_token(cls) -> Positions:
        """The last prompt token only."""
        return cls(((Bound(END, -1), Bound(END, 0)),))

    @classmethod
    def window(cls, start: int, stop: int) -> Positions:
        """Generated tokens `start` to `stop` (excluded), counted from 0."""
        start, stop = _as_token_count(start), _as_token_count(stop)
        if not 0 <= start < stop:
            raise TrimtabError(f"a window of generated tokens needs 0 <= start < stop, got {start} and {stop}")
        return cls(((Bound(END, start), Bound(END, stop)),))

    @classmethod
    def first_generated(cls, k: int) -> Positions:
        """The first `k` generated tokens."""
        return cls.window(0, k)

    @classmethod
    def opening(cls, k: int) -> Positions:
        """The tokens that produce the answer's first `k`: the last prompt token and the first `k - 1` generated ones.

        Useful for formats that the model continues by itself once the answer has started that way, such as JSON.
        """
        k = _as_token_count(k)
        if k < 1:
            raise TrimtabError(f"an opening has one token or more, got {k}")
        return cls(((Bound(END, -1), Bound(END, k - 1)),))

    @classmethod
    def span(cls, start: int, stop: int) -> Positions:
        """Prompt tokens `start` to `stop` (excluded), counted from 0 in the rendered prompt."""
        start, stop = _as_token_count(start), _as_token_count(stop)
        if not 0 <= start < stop:
            fix = "; Positions.tokens([-2, -1]) counts from the prompt's end" if min(start, stop) < 0 else ""
            raise TrimtabError(f"a span needs 0 <= start < stop, got {start} and {stop}{fix}")
        return cls(((Bound(START, start), Bound(START, stop)),))

    @classmethod
    @check_arguments
    def tokens(cls, indices: Sequence[int]) -> Positions:
        """These tokens of the rendered prompt, counted from 0. A negative index counts from its end: -1 is the last."""
        listed = [as_int(i) for i in indices] if isinstance(indices, Iterable) else [as_int(indices)]
        numbers = {number for number in listed if number is not None}
        if not listed or None in listed:
            raise TrimtabError(f"token indices are whole numbers, at least one of them, got {indices!r}")
        anchors = [(START if i >= 0 else END, i) for i in sorted(numbers, key=lambda i: (i < 0, i))]
        return cls(tuple((Bound(anchor, i), Bound(anchor, i + 1)) for anchor, i in anchors))

    @classmethod
    def thinking(cls, opens: str | None = None, closes: str | None = None) -> Positions:
        """Generated tokens inside the thinking: after the marker that opens it and before the one that closes it.

        Args:
            opens: The text of the opening marker; by default the model's own, such as `<think>`.
            closes: The text of the closing marker; by default the model's own, such as `</think>`.
        """
        return cls(rule=Meaning(THINKING, _pair(opens, closes)))

    @classmethod
    def answer(cls, opens: str | None = None, closes: str | None = None) -> Positions:
        """Generated tokens outside the thinking and its markers; all of them if the model doesn't think.

        Args:
            opens: The text of the marker that opens thinking; by default the model's own.
            closes: The text of the marker that closes it; by default the model's own.
        """
        return cls(rule=Meaning(ANSWER, _pair(opens, closes)))

    @classmethod
    def after(cls, text: str) -> Positions:
        """Generated tokens after the token that completes the first occurrence of this text."""
        return cls(rule=Meaning(AFTER, (text,)))

    @classmethod
    def at(cls, text: str) -> Positions:
        """Each generated token that completes an occurrence of this text, but not the tokens that begin it."""
        return cls(rule=Meaning(AT, (text,)))

    @classmethod
    def outside_tools(cls, *markers: tuple[str, str]) -> Positions:
        """Generated tokens outside tool calls, or other structured parts, and outside their markers.

        Args:
            markers: Pairs of texts that open and close such a part, where an empty closing text means "to the end of
                the answer"; by default the model's own, such as `<tool_call>` and `</tool_call>`.
        """
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in markers):
            raise TrimtabError(f"markers come in pairs, outside_tools((opens, closes), …), got {markers!r}")
        return cls(rule=Meaning(OUTSIDE_TOOLS, tuple(chain(*markers))))

    def __or__(self, other: Positions) -> Positions:
        if not isinstance(other, Positions):
            return NotImplemented
        if self.rule is None and other.rule is None:
            return Positions(self.intervals + tuple(i for i in other.intervals if i not in self.intervals))
        return _combine("any", self, other)

    def __add__(self, other: object) -> Positions:
        raise TrimtabError("positions are combined by a | b (either), a & b (both) and ~a (all others)")

    __sub__ = __add__

    def __and__(self, other: Positions) -> Positions:
        return _combine("all", self, other) if isinstance(other, Positions) else NotImplemented

    def __invert__(self) -> Positions:
        return Positions(rule=Combined("not", (self,)))

    @property
    def parts(self) -> tuple[Positions, ...]:
        """The leaves of the combination: positions that have intervals or a meaning."""
        if not isinstance(self.rule, Combined):
            return (self,)
        return tuple(chain.from_iterable(part.parts for part in self.rule.parts))

    @property
    def meanings(self) -> frozenset[Meaning]:
        """The meanings that it depends on; empty if the prompt's length alone determines the positions."""
        return frozenset(part.rule for part in self.parts if isinstance(part.rule, Meaning))

    @property
    def follows_prompt(self) -> bool:
        """Whether the positions depend on where the prompt ends."""
        bounds = [bound for part in self.parts for interval in part.intervals for bound in interval]
        return bool(self.meanings) or any(bound is not None and bound.anchor == END for bound in bounds)

    def reach(self, prompt_length: int) -> Intervals:
        """Like `resolve`, the union over all possible generated texts."""
        meanings = sorted(self.meanings)
        every = chain.from_iterable(combinations(meanings, n) for n in range(len(meanings) + 1))
        reaches = [self.resolve(prompt_length, holding) for holding in every]
        return reaches[0] if len(reaches) == 1 else union(*reaches)

    def resolve(self, prompt_length: int, holding: Collection[Meaning] | None = None) -> Intervals:
        """Absolute `(start, stop)` pairs for a prompt of `prompt_length` tokens, without empty ones.

        Args:
            prompt_length: The length of the prompt in tokens.
            holding: The meanings of one generated token. The result is then valid for that token and for the prompt.
                Required unless the positions have no meanings.

        Returns:
            The intervals. A `None` stop means "to the end of the text".

        Raises:
            TrimtabError: A span reaches past the prompt, a token isn't in it, or `holding` is needed and missing.
        """
        if isinstance(self.rule, Combined):
            parts = [part.resolve(prompt_length, holding) for part in self.rule.parts]
            if self.rule.operator == "not":
                return complement(*parts)
            return union(*parts) if self.rule.operator == "any" else intersection(*parts)
        if self.rule is not None:
            if holding is None:
                raise TrimtabError(f"positions {self} depend on the generated text, so they aren't known in advance")
            return ((prompt_length, None),) if self.rule in holding else ()
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

    def to_json(self) -> Any:
        if isinstance(self.rule, Combined):
            parts = [part.to_json() for part in self.rule.parts]
            return {self.rule.operator: parts[0] if self.rule.operator == "not" else parts}
        if self.rule is not None:
            return {"meaning": self.rule.kind, "texts": list(self.rule.texts)}
        return [
            [start.anchor, start.offset, *((None, None) if stop is None else (stop.anchor, stop.offset))]
            for start, stop in self.intervals
        ]

    @classmethod
    def from_json(cls, data: Any) -> Positions:
        """The inverse of `to_json`. Raises `TrimtabError`, or `ValueError` and similar, for anything else."""
        if not isinstance(data, dict):
            return cls(tuple((Bound(a, i), None if b is None else Bound(b, j)) for a, i, b, j in data))
        if data.keys() == {"meaning", "texts"}:
            return cls(rule=Meaning(data["meaning"], tuple(data["texts"])))
        ((how, parts),) = data.items()
        if how == "not":
            return cls(rule=Combined(how, (cls.from_json(parts),)))
        if how not in ("any", "all") or not parts:
            raise ValueError(f"positions of the kind {how!r} aren't known")
        return cls(rule=Combined(how, tuple(cls.from_json(part) for part in parts)))

    def in_prompt(self, prompt_length: int) -> list[int]:
        """The indices of the positions inside a prompt of this length, in ascending order, without generated tokens.

        Raises `TrimtabError` as `resolve` does, and for positions by meaning, which only apply to generated tokens.
        """
        spans = self.resolve(prompt_length)
        return sorted({p for a, b in spans for p in range(a, prompt_length if b is None else min(b, prompt_length))})

    @classmethod
    def parse(cls, text: str) -> Positions:
        """Parse the textual form, in which `|`, `&`, `~` and parentheses combine rules.

        A rule is a name in `NAMED`, `opening:K`, `first:K`, `window:A:B`, `span:A:B`, `tokens:A,B`, or one of the
        meanings `thinking`, `answer`, `after:TEXT`, `at:TEXT`, `outside-tools`. Raises `TrimtabError` for anything
        else.
        """
        from trimtab.steering.grammar import parse

        if not isinstance(text, str):
            raise TrimtabError(f"positions are read from a text such as 'generated', got {text!r}")
        return parse(text)

    def __str__(self) -> str:
        if self.rule is not None:
            from trimtab.steering.grammar import format_rule

            return format_rule(self.rule)
        for name, positions in NAMED.items():
            if positions == self:
                return name
        tokens = [_token(start, stop) for start, stop in self.intervals]
        if None not in tokens and len(tokens) > 1:
            return f"tokens:{','.join(map(str, tokens))}"
        return " | ".join(_interval(start, stop) for start, stop in self.intervals) or "nowhere"

    def __repr__(self) -> str:
        return f"Positions({self})"


def _as_token_count(number: Any) -> int:
    value = as_int(number)
    if value is None:
        raise TrimtabError(f"an offset is a whole number of tokens, got {number!r}")
    return value


def _pair(opens: str | None, closes: str | None) -> tuple[str, ...]:
    return () if opens is None and closes is None else (opens or "", closes or "")


def _combine(operator: str, *parts: Positions) -> Positions:
    """Combine the parts. Nested combinations of the same kind are flattened."""
    flat: list[Positions] = []
    for part in parts:
        alike = isinstance(part.rule, Combined) and part.rule.operator == operator
        flat += part.rule.parts if alike else [part]  # type: ignore[union-attr]
    return Positions(rule=Combined(operator, tuple(dict.fromkeys(flat))))


def _token(start: Bound, stop: Bound | None) -> int | None:
    """The index of the prompt token that the interval consists of; `None` if it isn't a single prompt token."""
    if stop is None or start.anchor != stop.anchor or stop.offset != start.offset + 1:
        return None
    return start.offset if start.anchor == START or start.offset < 0 else None


def _interval(start: Bound, stop: Bound | None) -> str:
    for name, positions in NAMED.items():
        if positions.intervals == ((start, stop),):
            return name
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
