"""A request's steering as a program: over which of its tokens it is in which state, and what a state does.

Positions are absolute, so that a program is the same however its prompt is cut into chunks, and however often the
request is preempted and resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from trimtab.engines.folding import Slot, as_rows, call_of, slots_at, sweep
from trimtab.steering import Edit, ScaleKeys, Site
from trimtab.steering.conditional import conditional
from trimtab.steering.meanings import Meaning
from trimtab.steering.operations import add


@dataclass(frozen=True)
class Identified:
    """An edit, and a name that is the same exactly for edits of the same content and strength."""

    name: str
    edit: Edit


@dataclass(frozen=True)
class State:
    """What acts on a token: these edits, in order. States of the same `key` are the same."""

    key: str
    edits: tuple[Edit, ...] = field(compare=False)

    @cached_property
    def slots(self) -> dict[Site, list[Slot]]:
        """By site."""
        edits = tuple(conditional(edit) for edit in self.edits)
        return {site: slots_at(edits, site) for site in sorted({edit.site for edit in edits})}

    @cached_property
    def added(self) -> dict[Site, Slot]:
        """The blocks behind which it only adds."""
        return {
            site: slots[0]
            for site, slots in self.slots.items()
            if site.kind == "residual" and len(slots) == 1 and _adds(slots[0])
        }

    @cached_property
    def staged(self) -> dict[Site, list[Slot]]:
        """All other sites."""
        return {site: slots for site, slots in self.slots.items() if site not in self.added}

    @cached_property
    def pushed(self) -> frozenset[Site]:
        """Where it pushes activations: all its sites but those of keys that are merely scaled."""
        return frozenset(edit.site for edit in self.edits if not isinstance(edit.operation, ScaleKeys))

    @property
    def banked(self) -> bool:
        """Whether it adds anywhere, and so needs a slot of the bank."""
        return bool(self.added)

    @property
    def mapped(self) -> bool:
        """Whether it does more than add anywhere, and so needs a slot of the maps of captured graphs."""
        return bool(self.staged)

    def row(self, site: Site, dtype: torch.dtype) -> Tensor:
        """What it adds after a block: `[width]`. Raises `TrimtabError` for numbers that the dtype can't hold."""
        slot = self.added[site]
        return as_rows(call_of(slot)[1], dtype, slot)["vector"]


@dataclass(frozen=True)
class Segment:
    """From token `start` to `stop` (`None`: the end) a request is in this state."""

    start: int
    stop: int | None
    state: State


def compile_program(
    edits: Sequence[Identified], prompt_length: int, holding: Collection[Meaning] | None = None
) -> tuple[Segment, ...]:
    """The segments, in order; between them nothing acts. Raises `TrimtabError` for a span that reaches past the prompt.

    What is next to each other and the same is one segment. With positions by meaning they are right for the prompt, and
    for a generated token of which the meanings of `holding` hold; without these it raises.
    """
    plain = tuple(identified.edit for identified in edits)
    segments: list[Segment] = []
    for start, stop, rules in sweep(plain, prompt_length, holding):
        acting = [identified for identified in edits if identified.edit.positions in rules]
        key = hashlib.sha256("\n".join(identified.name for identified in acting).encode()).hexdigest()[:32]
        state = _kept(State(key, tuple(identified.edit for identified in acting)))
        if segments and segments[-1].stop == start and segments[-1].state == state:
            segments[-1] = replace(segments[-1], stop=stop)
        else:
            segments.append(Segment(start, stop, state))
    return tuple(segments)


@lru_cache(maxsize=512)
def _kept(state: State) -> State:
    """The state of this key that was made first, with what it has worked out since."""
    return state


@lru_cache(maxsize=512)
def check_range(state: State, dtype: torch.dtype) -> None:
    """Raises `TrimtabError` where what a state adds can't be held in the model's dtype, or its edits don't go
    together."""
    for site in state.added:
        state.row(site, dtype)
    for slots in state.staged.values():
        for slot in slots:
            if len(slot) > 1:
                call_of(slot)


def runs(segments: Sequence[Segment], first: int, count: int) -> Iterator[tuple[int, State | None]]:
    """Tokens `first` to `first + count` as stretches `(length, state)`, `None` where nothing acts."""
    at, end = first, first + count
    for segment in segments:
        if segment.stop is not None and segment.stop <= at:
            continue
        if at >= end:
            return
        if segment.start >= end:
            break
        if segment.start > at:
            yield segment.start - at, None
            at = segment.start
        stop = end if segment.stop is None else min(end, segment.stop)
        yield stop - at, segment.state
        at = stop
    if at < end:
        yield end - at, None


def next_border(segments: Sequence[Segment], position: int) -> int | None:
    """The first position from `position` on at which the state changes; `None`: it doesn't any more."""
    borders = (bound for s in segments for bound in (s.start, s.stop) if bound is not None and bound >= position)
    return min(borders, default=None)


def _adds(slot: Slot) -> bool:
    operation = slot[0].operation
    return operation.kernel is add and not operation.keep_norm
