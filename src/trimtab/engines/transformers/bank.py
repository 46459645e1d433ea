"""The parameters of edits in continuous batching, kept on the model's device, with one slot per row.

Each site has lanes, one for each kernel of each step of its edits, like the stages of `plan`. A lane's banks hold one
row of parameters per slot. A row that joins writes its slot in each lane; when a row leaves, the last one moves into
its slot; the other slots don't change. A decode step of one token per row reads the banks as they are, without a gather
and without a copy from the host. Parameters of recently used edits are already on the device (`KEPT`); otherwise all
parameters of a row are copied there at once. Low-rank maps are too large to be held by each slot: a lane holds each map
once (`map_bank`), and which rows have which map is copied to the device when that changes, once for all lanes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.folding import Active, Prepared, Stage, compiled, neutral_value, slots_at
from trimtab.engines.transformers.map_bank import IndexOf, MapBank
from trimtab.engines.transformers.rows import TensorCache
from trimtab.steering import Edit, Site
from trimtab.steering.low_rank import LowRank
from trimtab.steering.operations import Kernel, Rows, add

StageKey = tuple[int, Kernel, float]
"""The key of a lane at a site: the step of the site's edits, the kernel, and the share of the norm that is kept."""

INITIAL_SLOTS = 8
"""The initial number of slots in a lane; doubled when they are full."""
KEPT = 32
"""The number of most recently used sets of edits whose parameters are kept on the device."""


@dataclass(frozen=True)
class CompiledEdits:
    """Edits that act together, compiled: parameters by site and lane, and the norm of the vector added at each site."""

    rows: dict[Site, dict[StageKey, Rows]]
    added: dict[Site, float]


def compile_edits(edits: Sequence[Edit], dtype: torch.dtype) -> CompiledEdits:
    """Compile edits, in the model's dtype and on the CPU.

    Raises `TrimtabError` if a number overflows the dtype, or if the edits can't act together.
    """
    by_site: dict[Site, list[Edit]] = {}
    for edit in edits:
        by_site.setdefault(edit.site, []).append(edit)
    rows: dict[Site, dict[StageKey, Rows]] = {}
    added: dict[Site, float] = {}
    for site in sorted(by_site):
        slots = slots_at(tuple(by_site[site]), site)
        here = rows[site] = {}
        for step, slot in enumerate(slots):
            kernel, keep_norm, row = compiled(slot, dtype)
            here[step, kernel, keep_norm] = row
        if len(slots) == 1 and kernel is add and not keep_norm:  # otherwise the norm depends on the activations
            added[site] = float(
                torch.linalg.vector_norm(row["vector"], dtype=torch.promote_types(dtype, torch.float32))
            )
    return CompiledEdits(rows, added)


class StageBank:
    """One kernel's parameters at one site: for each name a bank `[slots, 1, size]`, or one of low-rank maps."""

    def __init__(self, stage_key: StageKey, slots: int, device: torch.device, index_of: IndexOf) -> None:
        self.step, kernel, keep_norm = stage_key
        self.stage: Stage = Stage(kernel, keep_norm, {}, torch.zeros(0, dtype=torch.bool))
        self.banks: dict[str, Any] = {}
        self.active: Tensor = torch.zeros(slots, 1, dtype=torch.bool, device=device)
        self.names: list[frozenset[str]] = [frozenset()] * slots  # each slot's parameters by name; empty: not in use
        self.added = [0.0] * slots  # the norm of the vector that each slot adds, in a lane of additions
        self._index_of = index_of
        self._blank = [True] * slots  # whether a slot holds neutral parameters

    @property
    def used(self) -> bool:
        return any(self.names)

    def write(self, slot: int, row: Rows, added: float = 0.0) -> None:
        """Write a row's parameters, which are on the lane's device, to a slot."""
        self.added[slot] = added
        for name, value in row.items():
            if name not in self.banks:
                self.banks[name] = self._new(name, value)
        for name, bank in self.banks.items():
            value = row.get(name)
            if isinstance(bank, MapBank):
                bank.write(slot, value)
            elif value is not None:
                bank[slot, 0] = value
            elif not self._blank[slot]:
                bank[slot].fill_(neutral_value(name, self.stage.kernel))
        self._record_names(slot, frozenset(row))

    def clear(self, slot: int) -> None:
        """Make a slot do nothing."""
        self.added[slot] = 0.0
        if self._blank[slot]:
            return
        for name, bank in self.banks.items():
            if isinstance(bank, MapBank):
                bank.write(slot, None)
            else:
                bank[slot].fill_(neutral_value(name, self.stage.kernel))
        self._record_names(slot, frozenset())

    def move(self, slot: int, to: int) -> None:
        """Move the row in `slot` to the slot `to`; `slot` is free afterwards."""
        if slot != to and not self.names[slot]:
            self.clear(to)
        elif slot != to:
            for bank in self.banks.values():
                if isinstance(bank, MapBank):
                    bank.move(slot, to)
                else:
                    bank[to] = bank[slot]
            self._record_names(to, self.names[slot])
        else:
            for bank in self.banks.values():
                if isinstance(bank, MapBank):
                    bank.write(slot, None)
        self.added[to] = self.added[slot]
        self.names[slot] = frozenset()

    def tidy(self) -> None:
        """Drop banks that no row uses any more."""
        for name in self.banks.keys() - frozenset().union(*self.names):
            del self.banks[name]

    def grow(self, slots: int) -> None:
        """Make room for `slots` rows."""
        more = slots - len(self.names)
        for name, bank in self.banks.items():
            if isinstance(bank, MapBank):
                bank.grow(slots)
            else:
                blank = bank.new_full((more, *bank.shape[1:]), neutral_value(name, self.stage.kernel))
                self.banks[name] = torch.cat([bank, blank])
        self.active = torch.cat([self.active, self.active.new_zeros(more, 1)])
        self.names += [frozenset()] * more
        self.added += [0.0] * more
        self._blank += [True] * more

    def to(self, device: torch.device) -> None:
        """Move to the device of the site's activations."""
        self.active = self.active.to(device)
        for name, bank in self.banks.items():
            if isinstance(bank, MapBank):
                bank.to(device)
            else:
                self.banks[name] = bank.to(device)

    def prepared(self, rows: int, dtype: torch.dtype) -> tuple[Stage, Rows, Active]:
        """The arguments of `apply` for the first `rows` slots and activations `[rows, 1, width]` of this dtype."""
        parameters: dict[str, Any] = {}
        for name, bank in self.banks.items():
            parameters[name] = bank.selected(rows) if isinstance(bank, MapBank) else bank[:rows]
        if self.stage.only_adds:
            return self.stage, {"vector": parameters["vector"].to(dtype)}, None
        if self.stage.in_place:
            return self.stage, parameters, None
        return self.stage, parameters, all(self.names[:rows]) or self.active[:rows]

    def _new(self, name: str, value: Tensor | LowRank) -> Any:
        slots = len(self.names)
        if isinstance(value, LowRank):
            return MapBank(slots, self._index_of)
        return value.new_full((slots, 1, len(value)), neutral_value(name, self.stage.kernel))

    def _record_names(self, slot: int, names: frozenset[str]) -> None:
        if not self.stage.in_place:
            self.active[slot].fill_(bool(names))
        self.names[slot], self._blank[slot] = names, not names


class Bank:
    """The lanes of a batch, with one row in each of the slots from 0 up to `rows`.

    Args:
        dtype: The model's dtype.
        device_of: Returns the device on which a site's activations are expected, before any have been seen.
    """

    def __init__(self, dtype: torch.dtype, device_of: Callable[[Site], torch.device]) -> None:
        self.rows = 0
        self.stage_banks: dict[Site, dict[StageKey, StageBank]] = {}
        self._dtype = dtype
        self._device_of = device_of
        self._devices: dict[Site, torch.device] = {}
        self._slots = INITIAL_SLOTS
        self._index_of = TensorCache()
        self._kept: OrderedDict[tuple[Edit, ...], CompiledEdits] = OrderedDict()

    @property
    def sites(self) -> list[Site]:
        """The sites at which any row is edited."""
        return sorted(self.stage_banks)

    def touched(self, site: Site) -> list[bool]:
        """Whether each row is edited at a site."""
        touched = [False] * self.rows
        for stage_bank in self.stage_banks.get(site, {}).values():
            touched = [bool(names) or before for names, before in zip(stage_bank.names, touched, strict=False)]
        return touched

    def added(self, site: Site) -> list[float]:
        """The norm of the vector added to each row at a site; 0 if it isn't known here, since other operations act."""
        stage_banks = list(self.stage_banks.get(site, {}).values())
        return stage_banks[0].added[: self.rows] if len(stage_banks) == 1 else [0.0] * self.rows

    def insert(self, edits: tuple[Edit, ...]) -> None:
        """Append a row with these edits. Raises as `compile_edits` does; the bank is unchanged then."""
        state = self._state(edits)
        if self.rows == self._slots:
            self._slots *= 2
            for stage_bank in self._all():
                stage_bank.grow(self._slots)
        self.rows += 1
        self._write(self.rows - 1, state)

    def change(self, row: int, edits: tuple[Edit, ...]) -> None:
        """Replace a row's edits."""
        self._write(row, self._state(edits))
        self._tidy()

    def remove(self, row: int) -> None:
        """Remove a row; the last one takes its slot."""
        self.rows -= 1
        for stage_bank in self._all():
            stage_bank.move(self.rows, row)
        self._tidy()

    def prepared(self, site: Site, x: Tensor) -> Prepared:
        """The operations on the batch's activations `[rows, 1, width]` at a site, in order."""
        stage_banks = sorted(self.stage_banks[site].values(), key=lambda stage_bank: stage_bank.step)
        if self._device(site) != x.device:
            self._devices[site] = x.device
            self._kept.clear()  # their parameters are on the device of before
            for lane in stage_banks:
                lane.to(x.device)
        return [lane.prepared(self.rows, x.dtype) for lane in stage_banks]

    def _all(self) -> list[StageBank]:
        return [stage_bank for here in self.stage_banks.values() for stage_bank in here.values()]

    def _device(self, site: Site) -> torch.device:
        if site not in self._devices:
            self._devices[site] = self._device_of(site)
        return self._devices[site]

    def _write(self, slot: int, state: CompiledEdits) -> None:
        for site, rows in state.rows.items():
            here = self.stage_banks.setdefault(site, {})
            for stage_key in rows.keys() - here.keys():
                here[stage_key] = StageBank(stage_key, self._slots, self._device(site), self._index_of)
        for site, here in self.stage_banks.items():
            rows = state.rows.get(site, {})
            for stage_key, stage_bank in here.items():
                if stage_key in rows:
                    stage_bank.write(slot, rows[stage_key], state.added.get(site, 0.0))
                else:
                    stage_bank.clear(slot)

    def _tidy(self) -> None:
        for site, here in list(self.stage_banks.items()):
            for stage_key, stage_bank in list(here.items()):
                if not stage_bank.used:
                    del here[stage_key]
                elif len(stage_bank.banks) > 1:
                    stage_bank.tidy()
            if not here:
                del self.stage_banks[site]

    def _state(self, edits: tuple[Edit, ...]) -> CompiledEdits:
        """Compiled edits, with their parameters on the devices of their lanes."""
        state = self._kept.get(edits)
        if state is None:
            state = self._kept[edits] = self._moved(compile_edits(edits, self._dtype))
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(edits)
        return state

    def _moved(self, state: CompiledEdits) -> CompiledEdits:
        """A copy on the devices of the sites, with one transfer per device and dtype."""
        moved: dict[Site, dict[StageKey, Any]] = {}
        maps: dict[tuple[int, torch.device], LowRank] = {}  # to be moved
        parts: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for site, rows in state.rows.items():
            device = self._device(site)
            moved[site] = {address: dict(row) for address, row in rows.items()}
            for row in moved[site].values():
                for value in row.values():
                    if isinstance(value, LowRank):
                        if value.held_on(device) is None and (id(value), device) not in maps:
                            maps[id(value), device] = value
                            parts.setdefault((device, value.read.dtype), []).extend(value.tensors)
                    elif value.device != device:
                        parts.setdefault((device, value.dtype), []).append(value)
        copies: dict[tuple[int, torch.device], Tensor] = {}
        for (device, _), tensors in parts.items():
            split = torch.cat([tensor.flatten() for tensor in tensors]).to(device).split([x.numel() for x in tensors])
            for tensor, copy in zip(tensors, split, strict=True):
                copies[id(tensor), device] = copy.view(tensor.shape)
        for (_, device), low_rank in maps.items():
            low_rank.hold(device, [copies[id(tensor), device] for tensor in low_rank.tensors])
        for site, lanes in moved.items():
            device = self._device(site)
            for row in lanes.values():
                for name, value in row.items():
                    row[name] = (
                        value.to(device) if isinstance(value, LowRank) else copies.get((id(value), device), value)
                    )
        return CompiledEdits(moved, state.added)
