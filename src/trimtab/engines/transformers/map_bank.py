"""The low-rank maps of a running batch's rows, each held once in a lane's stack, however many rows have it.

`LowRank` keeps another copy of each on its device, which serves batches that have only one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.steering.low_rank import FEW, BatchedMaps, LowRank, MapStack, SelectedMaps

IndexOf = Callable[[tuple[int, ...], torch.device], Tensor]
"""Returns integers as a tensor on a device; kept copies are reused."""


class MapBank:
    """The maps of one lane, one per slot of the lane or none.

    They are stacked, so that all rows are edited by two batched products. A new map is written to the end of the stack;
    when no slot has a map any more, the last one in the stack takes its place. The others aren't touched.

    Args:
        slots: The number of slots of the lane.
        index_of: Copies indices to a device. Lanes that share it share the copies, too.
    """

    def __init__(self, slots: int, index_of: IndexOf) -> None:
        self.maps: list[LowRank | None] = [None] * slots
        self._index_of = index_of
        self._stacked: list[LowRank] = []
        self._users: list[int] = []  # the number of slots that have each stacked map
        self._stack: MapStack | None = None

    def write(self, slot: int, low_rank: LowRank | None) -> None:
        """Give a slot a map, which is on the lane's device, or none."""
        new = low_rank if low_rank is not None and low_rank.rank else None
        old, self.maps[slot] = self.maps[slot], new
        if new is old:
            return
        if old is not None:
            self._release(old)
        if new is not None:
            self._acquire(new)

    def move(self, slot: int, to: int) -> None:
        """Move a slot's map to another slot."""
        self.write(to, self.maps[slot])
        self.write(slot, None)

    def grow(self, slots: int) -> None:
        """Make room for `slots` slots."""
        self.maps += [None] * (slots - len(self.maps))

    def to(self, device: torch.device) -> None:
        """Move to another device."""
        moved = {id(low_rank): low_rank.to(device) for low_rank in self._stacked}
        self.maps = [low_rank and moved[id(low_rank)] for low_rank in self.maps]
        self._stacked = list(moved.values())
        self._stack = self._stack and self._stack.to(device)

    def selected(self, rows: int) -> SelectedMaps:
        """The maps of the first `rows` slots, for activations `[rows, 1, width]`."""
        if self._stack is None:
            return SelectedMaps()
        slots: list[list[int]] = [[] for _ in self._stacked]
        for slot, low_rank in enumerate(self.maps[:rows]):
            if low_rank is not None:
                slots[self._place(low_rank)].append(slot)
        if len(slots) == 1 and len(slots[0]) == rows:
            return SelectedMaps(single=self._stacked[0])
        device = self._stack.read.device
        few = [len(of_map) <= FEW for of_map in slots]
        if sum(few) < 2:
            few = [False] * len(few)
        separate = [
            (low_rank, self._index_of(tuple(of_map), device))
            for low_rank, of_map, batched in zip(self._stacked, slots, few, strict=True)
            if not batched
        ]
        if not any(few):
            return SelectedMaps(separate=separate)
        slots = [of_map if batched else [] for of_map, batched in zip(slots, few, strict=True)]
        most = max(map(len, slots))
        table = [slot for of_map in slots for slot in (of_map + [(of_map or [0])[0]] * most)[:most]]
        places = [most * i + n for i, of_map in enumerate(slots) for n in range(len(of_map))]
        tokens = [slot for of_map in slots for slot in of_map]
        indices = self._index_of((*table, *places, *tokens), device)
        in_table, flat_indices, token_indices = indices.split([len(table), len(places), len(tokens)])
        stack = self._stack.first(len(slots))
        return SelectedMaps(
            separate=separate, batched=BatchedMaps(stack, in_table.view(len(slots), most), flat_indices, token_indices)
        )

    def _place(self, low_rank: LowRank) -> int:
        return next(i for i, stacked in enumerate(self._stacked) if stacked is low_rank)

    def _acquire(self, low_rank: LowRank) -> None:
        if any(stacked is low_rank for stacked in self._stacked):
            self._users[self._place(low_rank)] += 1
            return
        count = len(self._stacked)
        if self._stack is None:
            self._stack = MapStack.for_maps_like(low_rank, 1, low_rank.rank)
        capacity, rank = self._stack.size
        if count == capacity or low_rank.rank > rank:
            capacity = 2 * capacity if count == capacity else capacity
            self._stack = self._stack.resized(capacity, max(rank, low_rank.rank))
        self._stack.put(count, low_rank)
        self._stacked.append(low_rank)
        self._users.append(1)

    def _release(self, low_rank: LowRank) -> None:
        place = self._place(low_rank)
        self._users[place] -= 1
        if self._users[place]:
            return
        assert self._stack is not None
        last = len(self._stacked) - 1
        if place < last:
            self._stack.move(last, place)
            self._stacked[place], self._users[place] = self._stacked[last], self._users[last]
        self._stacked.pop()
        self._users.pop()
