"""One forward pass: what is done to which of its tokens, at each site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.engines.folding import Active, Stage, States, apply
from trimtab.engines.vllm.bank import EMPTY_SLOT, Bank, Slots, to_device
from trimtab.engines.vllm.program import State
from trimtab.steering import Site
from trimtab.steering.operations import Rows

MAX_CACHED_TOKENS = 512
"""Passes with at most this many tokens keep their gathered rows, for following passes that are alike."""

Runs = Sequence[tuple[int, State | None]]
"""A pass's tokens as ranges `(length, state)`."""
Prepared = Iterable[tuple[Stage, Rows, Active]]


@dataclass(frozen=True)
class Staged:
    """Everything that is more than an addition: kernel calls for all requests' states, which are numbered from 1."""

    numbers: Mapping[str, int]
    sites: Mapping[Site, Sequence[Stage]]


@dataclass(eq=False)
class Step:
    """What acts on tokens `low` to `high` of a pass. Tokens before and after, and other sites, aren't changed.

    `index` are the bank slots of these tokens, `[high - low]`, `numbers` their states as numbered by `staged`; `adds`
    are the blocks after which something is added.
    """

    low: int
    high: int
    index: Tensor
    numbers: States
    adds: frozenset[Site]
    staged: Staged
    _rows: dict[Site, Tensor] = field(default_factory=dict)
    _sorted: dict[tuple[Site, int], tuple[Rows, Active]] = field(default_factory=dict)

    def apply(self, bank: Bank, site: Site, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit the residual stream `hidden + residual`, `[tokens, width]` each, by changing only `hidden`."""
        whole = self.low == 0 and self.high == hidden.shape[0]
        if site in self.adds:
            (hidden if whole else hidden[self.low : self.high]).add_(self._added(bank, site))
        stages = self.staged.sites.get(site)
        if stages:
            x = hidden[self.low : self.high]
            residual_rows = None if residual is None else residual[self.low : self.high]
            x.copy_(_edited(x, residual_rows, ((s, *self._gathered(site, i, s)) for i, s in enumerate(stages))))

    def _gathered(self, site: Site, number: int, stage: Stage) -> tuple[Rows, Active]:
        """A stage's rows and activity, one per token."""
        ready = self._sorted.get((site, number))
        if ready is None:
            ready = stage.gather(self.numbers), None if stage.in_place else stage.active[self.numbers.index]
            if stage.sorts and len(self.numbers.index) <= MAX_CACHED_TOKENS:
                self._sorted[site, number] = ready
        return ready

    def _added(self, bank: Bank, site: Site) -> Tensor:
        rows = self._rows.get(site)
        if rows is None:
            rows = bank.rows[site].index_select(0, self.index)
            if len(self.index) <= MAX_CACHED_TOKENS:
                self._rows[site] = rows
        return rows


def slots_of(runs: Runs, slots: Slots, acts: Callable[[State], bool]) -> Tensor:
    """The slots of the tokens up to the last one whose state `acts`, on the host."""
    numbers = [slots[state.key] if state is not None and acts(state) else EMPTY_SLOT for _, state in runs]
    while numbers and numbers[-1] == EMPTY_SLOT:
        numbers.pop()
    lengths = torch.tensor([length for length, _ in runs[: len(numbers)]], dtype=torch.long)
    return torch.tensor(numbers, dtype=torch.long).repeat_interleave(lengths)


def make_step(runs: Runs, bank: Bank, staged: Staged) -> Step | None:
    """The step for a pass over these tokens; `None` if nothing acts."""
    while runs and runs[-1][1] is None:
        runs = runs[:-1]
    skipped = 0
    while runs and runs[0][1] is None:
        skipped += runs[0][0]
        runs = runs[1:]
    if not runs:
        return None
    lengths = torch.tensor([length for length, _ in runs])
    slots = [bank.slots[state.key] if state is not None and state.banked else EMPTY_SLOT for _, state in runs]
    numbers = [staged.numbers.get(state.key, 0) if state is not None else 0 for _, state in runs]
    device = bank.index.device
    present = {state.key: state for _, state in runs if state is not None}.values()
    return Step(
        low=skipped,
        high=skipped + int(lengths.sum()),
        index=to_device(torch.tensor(slots).repeat_interleave(lengths), device),
        numbers=States.of(torch.tensor(numbers).repeat_interleave(lengths), device),
        adds=frozenset(site for state in present for site in state.added if site in bank.rows),
        staged=Staged(
            staged.numbers,
            {site: stages for site, stages in staged.sites.items() if any(site in state.staged for state in present)},
        ),
    )


def _edited(hidden: Tensor, residual: Tensor | None, prepared: Prepared) -> Tensor:
    """The new `hidden` after these stages have edited the residual stream; unchanged tokens are kept bit for bit."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    old = hidden.to(wide) if residual is None else hidden.to(wide) + residual.to(wide)
    x = old
    for stage, rows, active in prepared:
        x = apply(stage, rows, active, x)
    changed = (x != old).any(-1, keepdim=True)
    new = x if residual is None else x - residual.to(wide)
    return torch.where(changed, new.to(hidden.dtype), hidden)
