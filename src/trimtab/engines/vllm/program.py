"""A request's steering as a program: which of its tokens are in which state, and what each state does.

Positions are absolute, so a program doesn't depend on how the prompt is split into chunks, or on how often the request
is preempted and resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from trimtab.engines.folding import Slot, active_ranges, as_rows, kernel_call, slots_at
from trimtab.steering import Edit, ScaleKeys, Site
from trimtab.steering.conditional import with_conditional_operation
from trimtab.steering.meanings import Meaning
from trimtab.steering.operations import add


@dataclass(frozen=True)
class IdentifiedEdit:
    """An edit, with a name that is equal exactly for edits of equal content and strength."""

    name: str
    edit: Edit


@dataclass(frozen=True)
class State:
    """The edits that act on a token, in order. States with the same `key` are equal."""

    key: str
    edits: tuple[Edit, ...] = field(compare=False)

    @cached_property
    def slots(self) -> dict[Site, list[Slot]]:
        """The slots by site."""
        edits = tuple(with_conditional_operation(edit) for edit in self.edits)
        return {site: slots_at(edits, site) for site in sorted({edit.site for edit in edits})}

    @cached_property
    def added(self) -> dict[Site, Slot]:
        """The blocks after which the state only adds."""
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
        """The sites at which the state changes activations, except those where it only scales keys."""
        return frozenset(edit.site for edit in self.edits if not isinstance(edit.operation, ScaleKeys))

    @property
    def banked(self) -> bool:
        """Whether the state adds anywhere, and therefore needs a slot of the bank."""
        return bool(self.added)

    @property
    def mapped(self) -> bool:
        """Whether the state does more than add anywhere, and therefore needs a slot of the maps of captured graphs."""
        return bool(self.staged)

    def row(self, site: Site, dtype: torch.dtype) -> Tensor:
        """The vector that the state adds after a block, `[width]`. Raises `TrimtabError` if it overflows the dtype."""
        slot = self.added[site]
        return as_rows(kernel_call(slot)[1], dtype, slot)["vector"]


@dataclass(frozen=True)
class Segment:
    """A request is in this state from token `start` to `stop` (`None`: the end)."""

    start: int
    stop: int | None
    state: State


def compile_program(
    edits: Sequence[IdentifiedEdit], prompt_length: int, holding: Collection[Meaning] | None = None
) -> tuple[Segment, ...]:
    """The segments, in order; between them nothing acts.

    Adjacent segments with the same state are merged. With positions by meaning, the segments are valid for the prompt,
    and for a generated token to which the meanings of `holding` apply; without `holding` this raises. Raises
    `TrimtabError` for a span that reaches past the prompt.
    """
    plain = tuple(identified.edit for identified in edits)
    segments: list[Segment] = []
    for start, stop, rules in active_ranges(plain, prompt_length, holding):
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
    """The first state that was made with this key, with its cached properties."""
    return state


@lru_cache(maxsize=512)
def check_range(state: State, dtype: torch.dtype) -> None:
    """Raises `TrimtabError` if a state's additions overflow the model's dtype, or if its edits can't be combined."""
    for site in state.added:
        state.row(site, dtype)
    for slots in state.staged.values():
        for slot in slots:
            if len(slot) > 1:
                kernel_call(slot)


def state_runs(segments: Sequence[Segment], first: int, count: int) -> Iterator[tuple[int, State | None]]:
    """Tokens `first` to `first + count` as ranges `(length, state)`; the state is `None` where nothing acts."""
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
    """The first position at or after `position` at which the state changes; `None` if it doesn't change any more."""
    borders = (bound for s in segments for bound in (s.start, s.stop) if bound is not None and bound >= position)
    return min(borders, default=None)


def _adds(slot: Slot) -> bool:
    operation = slot[0].operation
    return operation.kernel is add and not operation.keep_norm
