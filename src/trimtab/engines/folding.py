"""Fold edits into rows of parameters: edits that act together become one row, and rows of one kernel one kernel call.

An engine asks which edits act on which ranges of tokens (`active_ranges`), what a request's edits at a site fold to
there (`slots_at`), and for the calls that run all requests' edits at once (`stages_of`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering import Edit, Positions, ScoreOperation, Site, Steering
from trimtab.steering.low_rank import LowRank, LowRankBank
from trimtab.steering.meanings import Meaning
from trimtab.steering.operations import ACCEPTS_OUT, MERGE_ROWS, NEUTRAL, Kernel, Rows, add, with_norm_of

KEPT = 512
"""The number of slots whose compiled vectors are cached, together with their edits."""

Slot = tuple[Edit, ...]  # one operation, or neighboring edits that act together
Active = Tensor | bool | None
"""Where a stage acts: `[..., tokens]`, or `True` for everywhere; `None` if its rows already encode that."""


@dataclass(frozen=True)
class States:
    """The state of each token of a forward pass: on the device, and a copy on the CPU that is read without a sync."""

    index: Tensor
    on_cpu: Tensor

    @classmethod
    def of(cls, numbers: Tensor, device: torch.device) -> States:
        """The states with these numbers, which are on the CPU."""
        return cls(numbers.to(device), numbers)

    def to(self, device: torch.device) -> States:
        return self if self.index.device == device else States(self.index.to(device), self.on_cpu)

    @cached_property
    def common(self) -> int | None:
        """The state that all of these tokens share, or `None`."""
        if not self.on_cpu.numel():
            return None
        low, high = self.on_cpu.aminmax()
        return int(low) if int(low) == int(high) else None

    def __getitem__(self, which: slice) -> States:
        return States(self.index[which], self.on_cpu[which])


@dataclass(frozen=True)
class Stage:
    """One kernel call at one site: `rows[name]` is `[states, size]`, `active` is `[states]`.

    `keep_norm` is how much of the old norm is restored, as a share.
    """

    kernel: Kernel
    keep_norm: float
    rows: dict[str, Tensor | LowRankBank]
    active: Tensor
    _moved: dict[torch.device, Stage] = field(default_factory=dict, init=False, repr=False, compare=False)

    def to(self, device: torch.device) -> Stage:
        """This stage with its parameters on a device; copies are cached."""
        if self.active.device == device:
            return self
        if device not in self._moved:
            with torch.inference_mode(False):
                rows = {name: bank.to(device) for name, bank in self.rows.items()}
                self._moved[device] = Stage(self.kernel, self.keep_norm, rows, self.active.to(device))
        return self._moved[device]

    @property
    def sorts(self) -> bool:
        """Whether gathering sorts tokens by their maps; the result is small, and worth caching."""
        return any(isinstance(bank, LowRankBank) for bank in self.rows.values())

    def gather(self, states: States) -> Rows:
        """The rows of tokens in these states, one per token, on the states' device."""
        return {
            name: bank.pick(states.on_cpu) if isinstance(bank, LowRankBank) else bank[states.index]
            for name, bank in self.to(states.index.device).rows.items()
        }

    def prepare(self, states: States, dtype: torch.dtype) -> tuple[Rows, Active]:
        """The arguments of `apply` for tokens in these states, with activations of this dtype; without a device sync.

        If a stage acts in place on all tokens alike, its rows are a single row that broadcasts over them.
        """
        common = states.common if self.in_place else None
        rows = self.gather(states) if common is None else self._row(common, states.index.device)
        if self.only_adds:
            return {"vector": rows["vector"].to(dtype)}, None
        if self.in_place:
            return rows, None
        if self.active.device == states.on_cpu.device and bool(self.active[states.on_cpu].all()):
            return rows, True
        return rows, self.to(states.index.device).active[states.index]

    def _row(self, state: int, device: torch.device) -> Rows:
        """The parameters of one state, `[size]`, for a stage that acts in place."""
        banks = self.to(device).rows
        return {name: bank[state] for name, bank in banks.items() if isinstance(bank, Tensor)}

    @property
    def only_adds(self) -> bool:
        return self.kernel is add and not self.keep_norm

    @property
    def in_place(self) -> bool:
        """Whether it is a single addition or multiplication whose rows have no effect where the stage is inactive."""
        return self.kernel in NEUTRAL and not self.keep_norm


Prepared = list[tuple[Stage, Rows, Active]]
"""The operations at a site, in order, for the tokens of a pass: arguments of `apply`, except the activations."""


def check_joint_edits(steering: Steering) -> None:
    """Raises `TrimtabError` for edits that always act together but can't. What depends on a prompt is checked later."""
    possible = tuple(e for e in steering.edits if e.strength != 0 and not isinstance(e.operation, ScoreOperation))
    possible = tuple(e for e in possible if not hasattr(e.operation, "settled"))
    by_site: dict[Site, list[Edit]] = {}
    for edit in possible:
        by_site.setdefault(edit.site, []).append(edit)
    for site in sorted(by_site):
        for slot in slots_at(tuple(by_site[site]), site):
            alike: dict[tuple, list[Edit]] = {}
            for edit in slot:
                alike.setdefault((edit.positions, edit.gate), []).append(edit)
            for edits in alike.values():
                if len(edits) > 1:
                    kernel_call(edits)


def active_ranges(
    edits: tuple[Edit, ...], length: int, holding: Collection[Meaning] | None = None
) -> list[tuple[int, int | None, frozenset[Positions]]]:
    """The ranges of tokens over which a request's set of active position rules stays the same.

    `holding` is as in `Positions.resolve`: with positions by meaning, the result is valid for the prompt, and for a
    generated token that has these meanings. Raises `TrimtabError` as that does.
    """
    resolved = {rule: rule.resolve(length, holding) for rule in {edit.positions for edit in edits}}
    marks = {bound for spans in resolved.values() for span in spans for bound in span if bound is not None}
    borders: list[int | None] = [*sorted(marks), None]
    swept = []
    for start, stop in pairwise(borders):
        assert start is not None
        active = frozenset(
            rule for rule, spans in resolved.items() if any(a <= start and (b is None or start < b) for a, b in spans)
        )
        if active:
            swept.append((start, stop, active))
    return swept


def slots_at(edits: tuple[Edit, ...], site: Site) -> list[Slot]:
    """A request's edits at a site, in order; neighbors that act together share a slot."""
    slots: list[Slot] = []
    for edit in edits:
        if edit.site != site:
            continue
        if slots and _acts_together(slots[-1][-1], edit):
            slots[-1] += (edit,)
        else:
            slots.append((edit,))
    return slots


def _acts_together(edit: Edit, other: Edit) -> bool:
    a, b = edit.operation, other.operation
    return a.kernel is b.kernel and a.kernel in MERGE_ROWS and not (a.keep_norm or b.keep_norm)


def kernel_call(edits: Sequence[Edit]) -> tuple[Kernel, Rows]:
    """The kernel of one slot, and its parameters. Raises `TrimtabError` for projections that contradict each other."""
    kernel = edits[0].operation.kernel
    together = MERGE_ROWS.get(kernel)
    if together is None:
        return edits[0].operation.call(edits[0].strength)
    return kernel, together([edit.operation.row(edit.strength) for edit in edits], edits)


def as_rows(row: Rows, dtype: torch.dtype, edits: Sequence[Edit]) -> Rows:
    """One slot's parameters in the dtype that an engine computes in.

    Raises `TrimtabError` if a finite number overflows in that dtype.
    """
    cast = {name: value.to(dtype) for name, value in row.items()}
    for name, value in row.items():
        for old, new in zip(_tensors(value), _tensors(cast[name]), strict=True):
            if new is old or not bool((new.isinf() & old.isfinite()).any()):
                continue
            largest, most = float(old[old.isfinite()].abs().max()), torch.finfo(dtype).max
            kind = str(dtype).removeprefix("torch.")
            raise TrimtabError(
                f"{' + '.join(str(edit) for edit in edits)}: at layer {edits[0].site.layer} the largest element, times"
                f" the strength, is {largest:.4g}, and the model computes in {kind}, which holds at most {most:.4g};"
                " lower the strength, or load the model in bfloat16 or float32"
            )
    return cast


def _tensors(value: Tensor | LowRank) -> tuple[Tensor, ...]:
    return value.tensors if isinstance(value, LowRank) else (value,)


def stages_of(slots: dict[int, list[Slot]], dtype: torch.dtype) -> list[Stage]:
    """The stages of a site: slot i of every state runs in step i, and each step has one stage per kernel.

    Raises `TrimtabError` for numbers that overflow the dtype.
    """
    every = [slot for row_slots in slots.values() for slot in row_slots]
    if len(every) == 1 and _is_small(every[0]):
        return list(_cached_stages(tuple((state, tuple(row_slots)) for state, row_slots in slots.items()), dtype))
    return _stages_of(slots, dtype)


def _stages_of(slots: Mapping[int, Sequence[Slot]], dtype: torch.dtype) -> list[Stage]:
    stages = []
    for step in range(max(map(len, slots.values()), default=0)):  # there may be no slots
        groups: dict[tuple[Kernel, float], dict[int, Rows]] = {}
        for state, row_slots in slots.items():
            if step < len(row_slots):
                kernel, keep_norm, row = compiled(row_slots[step], dtype)
                groups.setdefault((kernel, keep_norm), {})[state] = row
        for (kernel, keep_norm), rows_of in groups.items():
            compute = compute_dtype(kernel, keep_norm, dtype)
            stages.append(_bank(kernel, keep_norm, rows_of, len(slots) + 1, compute))
    return stages


def compiled(slot: Slot, dtype: torch.dtype) -> tuple[Kernel, float, Rows]:
    """One slot's kernel, its share of the norm to keep, and its parameters, for activations of this dtype.

    Recently compiled vectors are cached (`KEPT`), since a request's prompt and its answer need the same ones.
    """
    return (_compiled_cached if _is_small(slot) else _compiled)(slot, dtype)


def _is_small(slot: Slot) -> bool:
    """Whether the slot's parameters are a vector, not a low-rank map."""
    return slot[0].operation.kernel in NEUTRAL


@torch.inference_mode(False)  # a cached vector may be used again where gradients are computed
def _compiled(slot: Slot, dtype: torch.dtype) -> tuple[Kernel, float, Rows]:
    kernel, row = kernel_call(slot)
    keep_norm = slot[0].operation.keep_norm
    return kernel, keep_norm, as_rows(row, compute_dtype(kernel, keep_norm, dtype), slot)


_compiled_cached = lru_cache(KEPT)(_compiled)


@lru_cache(KEPT)
@torch.inference_mode(False)
def _cached_stages(slots: tuple[tuple[int, tuple[Slot, ...]], ...], dtype: torch.dtype) -> tuple[Stage, ...]:
    """The stages of a single vector, cached together with their copies on devices."""
    return tuple(_stages_of(dict(slots), dtype))


def compute_dtype(kernel: Kernel, keep_norm: float, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a stage computes in, for a model that computes in `dtype`."""
    return dtype if kernel is add and not keep_norm else torch.promote_types(dtype, torch.float32)


def neutral_value(name: str, kernel: Kernel) -> float:
    """The value of a parameter that a row doesn't have, with which it has no effect."""
    return -torch.inf if name.startswith("floor.") else NEUTRAL.get(kernel, -0.0)


def _bank(kernel: Kernel, keep_norm: float, rows_of: dict[int, Rows], count: int, dtype: torch.dtype) -> Stage:
    """One stage from the rows of its states. A parameter that a row lacks gets a neutral value (see
    `neutral_value`).
    """
    active = torch.zeros(count, dtype=torch.bool)
    values: dict[str, dict[int, Any]] = {}
    for state, row in rows_of.items():
        active[state] = True
        for name, value in row.items():
            values.setdefault(name, {})[state] = value
    rows: dict[str, Tensor | LowRankBank] = {}
    for name, by_state in values.items():
        first = next(iter(by_state.values()))
        if isinstance(first, LowRank):
            rows[name] = LowRankBank(by_state, count)
            continue
        bank = rows[name] = torch.full((count, first.shape[0]), neutral_value(name, kernel), dtype=dtype)
        for state, value in by_state.items():
            bank[state] = value
    return Stage(kernel, keep_norm, rows, active)


def apply(stage: Stage, rows: Rows, active: Active, x: Tensor) -> Tensor:
    """Apply one stage to activations, given its gathered rows and activity, one per activation."""
    if active is None:
        return x + rows["vector"] if stage.only_adds else (x * rows["factor"]).to(x.dtype)
    new = _kernel_result(stage, rows, x).to(x.dtype)
    return new if isinstance(active, bool) else torch.where(active[..., None], new, x)


def apply_all(prepared: Prepared, x: Tensor) -> Tensor:
    """Apply all stages of a site, one after the other."""
    for stage, rows, active in prepared:
        x = apply(stage, rows, active, x)
    return x


def apply_in_place(stage: Stage, rows: Rows, active: Active, x: Tensor) -> None:
    """Like `apply`, in place; without a temporary copy if the last kernel can write to `x`."""
    if active is None:
        x.copy_(apply(stage, rows, active, x))
    elif isinstance(active, Tensor):
        torch.where(active[..., None], _kernel_result(stage, rows, x).to(x.dtype), x, out=x)
    elif next(iter(rows.values())).dtype != x.dtype or not (stage.keep_norm or stage.kernel in ACCEPTS_OUT):
        x.copy_(_kernel_result(stage, rows, x))  # this also casts
    elif stage.keep_norm:
        with_norm_of(x, stage.kernel(x, rows), stage.keep_norm, out=x)
    else:
        stage.kernel(x, rows, out=x)


def _kernel_result(stage: Stage, rows: Rows, x: Tensor) -> Tensor:
    """The stage's result for all of these activations, in the dtype that it computes in."""
    wide = x.to(next(iter(rows.values())).dtype)
    new = stage.kernel(wide, rows)
    return with_norm_of(wide, new, stage.keep_norm) if stage.keep_norm else new
