"""Requests with steering that depends on the generated text: the state of each token, once that token is known.

A worker knows each token that it has sampled before the next pass. In the prefix cache, the key of a block of generated
tokens contains everything that may act there: together with the earlier tokens, which the key also contains, that
determines what did act.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.engines.meanings import NOTHING, ActiveMeanings, Follower, FollowerState, meanings_of, possible_subsets
from trimtab.engines.vllm.program import IdentifiedEdit, Segment, State, compile_program


def compile_turning(edits: Sequence[IdentifiedEdit], prompt_length: int) -> dict[ActiveMeanings, tuple[Segment, ...]]:
    """The segments for each set of meanings that a generated token may have; a single entry if nothing depends on that.

    Raises `TrimtabError` as `compile_program` does.
    """
    meanings = meanings_of(identified.edit for identified in edits)
    return {holding: compile_program(edits, prompt_length, holding) for holding in possible_subsets(meanings)}


def reserved_segments(edits: Sequence[IdentifiedEdit], prompt_length: int) -> tuple[Segment, ...]:
    """The segments for everything that a request may need: they determine its slots, and the keys of its blocks.

    Raises `TrimtabError` as `compile_program` does.
    """
    tables = compile_turning(edits, prompt_length)
    if len(tables) == 1:
        return tables[NOTHING]
    states = {segment.state.key: segment.state for table in tables.values() for segment in table}
    names = "\n".join((str(prompt_length), *(identified.name for identified in edits)))
    every = State(hashlib.sha256(names.encode()).hexdigest()[:32], ())
    before = _between(tables[NOTHING], 0, prompt_length)
    return (*before, *(Segment(prompt_length, None, state) for state in (every, *states.values())))


@dataclass
class SegmentTracker:
    """One request's text, as far as it is known, and the segments that are valid for all of its tokens."""

    tables: Mapping[ActiveMeanings, tuple[Segment, ...]]
    follower: Follower
    known: int  # the number of known tokens, including the prompt
    segments: tuple[Segment, ...]
    at: FollowerState

    @classmethod
    def of(
        cls,
        tables: Mapping[ActiveMeanings, tuple[Segment, ...]],
        tokenizer: Any,
        ids: Sequence[int],
        prompt_length: int,
    ) -> SegmentTracker:
        """For a request with these tokens. Those after its prompt are the beginning of an answer."""
        meanings = frozenset().union(*tables)
        follower = Follower(tokenizer, meanings, ids[:prompt_length])
        tracker = cls(tables, follower, prompt_length, tables[NOTHING], follower.start)
        for token in ids[prompt_length:]:
            tracker.advance(token)
        return tracker

    @property
    def states(self) -> tuple[State, ...]:
        """All states that the request may be in."""
        return tuple({s.state.key: s.state for table in self.tables.values() for s in table}.values())

    def advance(self, token: int) -> bool:
        """Take the next generated token into account. Returns whether the segments have changed."""
        before, self.at = self.at, self.follower.after(self.at, token)
        self.known += 1
        if before.holding == self.at.holding:
            return False
        here = self.known - 1
        past, to_come = _between(self.segments, 0, here), _between(self.tables[self.at.holding], here, None)
        self.segments = (*past, *to_come)
        return True


def _between(segments: Sequence[Segment], first: int, stop: int | None) -> tuple[Segment, ...]:
    """The parts of the segments that are between these positions."""
    inside = []
    for segment in segments:
        start = max(segment.start, first)
        end = stop if segment.stop is None else segment.stop if stop is None else min(segment.stop, stop)
        if end is None or start < end:
            inside.append(replace(segment, start=start, stop=end))
    return tuple(inside)
