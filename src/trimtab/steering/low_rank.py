"""Low-rank maps of activations, and their application to a batch in which every token may have a different map.

A direction is copied for every token that it acts on. The matrices of a map are too large for that: 2,000 tokens at
rank 64 and width 4,096 would be gigabytes. So a bank holds each map once, and the tokens of a map are multiplied
together: two matrix products for each map with many tokens, and two batched products for all maps with few, as in
LoRA kernels. A pass with a single map is `x @ read.T` and `@ write`, without copies or sorting. Tokens without a map
aren't changed.

As in the model's own linear layers, the batch size may change the last bit of a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

FEW = 32
"""Maps with at most this many tokens in a pass share two batched products; each larger one has two separate ones."""
COPIES = 4
"""The maximum number of copies of a map, one per device or dtype."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """`x + strength * clamp(x @ read.T + bias, low, high) @ write`.

    `read` and `write` are `[rank, width]`, the others `[rank]`. `low` or `high` is `None` if there is no such bound.
    """

    read: Tensor
    bias: Tensor
    write: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    _copies: dict[Any, LowRank] = field(default_factory=dict, init=False, repr=False)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in (self.read, self.bias, self.write, self.low, self.high) if tensor is not None)

    @property
    def rank(self) -> int:
        return self.read.shape[0]

    def to(self, to: torch.device | torch.dtype) -> LowRank:
        """The map on this device or in this dtype. The copy is cached."""
        copy = self._copies.get(to)
        if copy is None:
            tensors = (self.read, self.bias, self.write, self.low, self.high)
            if all(tensor is None or to in (tensor.device, tensor.dtype) for tensor in tensors):
                return self
            if len(self._copies) >= COPIES:
                self._copies.clear()
            copy = LowRank(*(None if tensor is None else tensor.to(to) for tensor in tensors))  # type: ignore[arg-type]
            self._copies[to] = copy
        return copy

    def held_on(self, device: torch.device) -> LowRank | None:
        """The map on this device if it, or a cached copy, is there; otherwise `None`."""
        return self if self.read.device == device else self._copies.get(device)

    def hold(self, device: torch.device, tensors: Sequence[Tensor]) -> LowRank:
        """The map made of copies of `tensors` on this device, which `to` returns from now on."""
        if len(self._copies) >= COPIES:
            self._copies.clear()
        copies = iter(tensors)
        each = (self.read, self.bias, self.write, self.low, self.high)
        copy = LowRank(*(None if tensor is None else next(copies) for tensor in each))  # type: ignore[arg-type]
        self._copies[device] = copy
        return copy

    def edit(self, x: Tensor, strength: Tensor) -> Tensor:
        """The new activations `[..., width]`, for `x` `[..., width]` and `strength` `[..., 1]`."""
        if not self.rank:
            return x
        flat = x.reshape(-1, x.shape[-1])
        z = torch.addmm(self.bias, flat, self.read.T)
        z = _clamped(z, self.low, self.high) * strength.reshape(-1, 1)
        return torch.addmm(flat, z, self.write).view(x.shape)


class LowRankBank:
    """A bank of the maps of `count` states. States without a map, or with one of rank 0, change nothing."""

    def __init__(self, by_state: Mapping[int, LowRank], count: int) -> None:
        self.maps: list[LowRank] = list(
            {id(low_rank): low_rank for low_rank in by_state.values() if low_rank.rank}.values()
        )
        numbers = {id(low_rank): number for number, low_rank in enumerate(self.maps)}
        self.map_index: Tensor = torch.full((count,), -1)
        for state, low_rank in by_state.items():
            self.map_index[state] = numbers.get(id(low_rank), -1)
        self._stack: tuple[list[int], MapStack] | None = None
        self._moved: dict[torch.device, LowRankBank] = {}

    def to(self, device: torch.device) -> LowRankBank:
        """The bank with its maps on this device. The table of the states' maps stays on the host."""
        if all(low_rank.read.device == device for low_rank in self.maps):
            return self
        if device not in self._moved:
            moved = self._moved[device] = LowRankBank({}, 0)
            moved.maps = [low_rank.to(device) for low_rank in self.maps]
            moved.map_index = self.map_index
        return self._moved[device]

    def pick(self, states: Tensor) -> SelectedMaps:
        """The maps of tokens in these states, of any shape. Works on the CPU, to avoid synchronizing with a device."""
        numbers = self.map_index[states.flatten()]
        present = [number for number in numbers.unique().tolist() if number >= 0]
        if len(present) == 1 and bool((numbers == present[0]).all()):
            return SelectedMaps(single=self.maps[present[0]])
        tokens = {number: (numbers == number).nonzero().flatten() for number in present}
        few = [number for number in present if len(tokens[number]) <= FEW]
        few = few if len(few) > 1 else []
        separate = [
            (self.maps[number], tokens[number].to(self.maps[number].read.device))
            for number in present
            if number not in few
        ]
        return SelectedMaps(
            separate=separate, batched=self._batch(few, [tokens[number] for number in few]) if few else None
        )

    def _batch(self, numbers: list[int], tokens: Sequence[Tensor]) -> BatchedMaps:
        if self._stack is None or self._stack[0] != numbers:
            self._stack = numbers, MapStack.of([self.maps[number] for number in numbers])
        stack = self._stack[1]
        most = max(map(len, tokens))
        slots = torch.stack([torch.cat([at, at[:1].expand(most - len(at))]) for at in tokens])
        flat_indices = torch.cat([torch.arange(len(at)) + most * i for i, at in enumerate(tokens)])
        device = stack.read.device
        return BatchedMaps(stack, slots.to(device), flat_indices.to(device), torch.cat(list(tokens)).to(device))


@dataclass(frozen=True)
class SelectedMaps:
    """The maps of a pass's tokens: one for all, or each map with its tokens, indices into the flattened batch."""

    single: LowRank | None = None
    separate: Sequence[tuple[LowRank, Tensor]] = ()
    batched: BatchedMaps | None = None

    def edit(self, x: Tensor, strength: Tensor) -> Tensor:
        """The new activations `[..., width]`, for `x` `[..., width]` and `strength` `[..., 1]`."""
        if self.single is not None:
            return self.single.edit(x, strength)
        flat = x.reshape(-1, x.shape[-1])
        strength = strength.reshape(-1, 1)
        new = flat.clone()
        for low_rank, tokens in self.separate:
            new.index_copy_(0, tokens, low_rank.edit(flat[tokens], strength[tokens]))
        if self.batched is not None:
            new.index_copy_(0, self.batched.tokens, self.batched.edit(flat, strength))
        return new.view(x.shape)


@dataclass
class MapStack:
    """Several maps stacked, `[maps, rank, width]`. Maps of a smaller rank are padded with zeros, which do nothing."""

    read: Tensor
    bias: Tensor  # [maps, 1, rank], as are the bounds
    write: Tensor
    low: Tensor | None = None
    high: Tensor | None = None

    @classmethod
    def of(cls, maps: Sequence[LowRank]) -> MapStack:
        """The stack of these maps."""
        stack = cls.for_maps_like(maps[0], len(maps), max(low_rank.rank for low_rank in maps))
        for i, low_rank in enumerate(maps):
            stack.put(i, low_rank)
        return stack

    @classmethod
    def for_maps_like(cls, low_rank: LowRank, count: int, rank: int) -> MapStack:
        """Space for `count` maps of at most this rank, of the width, dtype and device of `low_rank`."""
        new, width = low_rank.read.new_zeros, low_rank.read.shape[1]
        return cls(new(count, rank, width), new(count, 1, rank), new(count, rank, width))

    @property
    def size(self) -> tuple[int, int]:
        """The number of maps that there is space for, and their largest rank."""
        return self.read.shape[0], self.read.shape[1]

    def put(self, i: int, low_rank: LowRank) -> None:
        """Write a map, whose rank fits, as map `i`."""
        rank = low_rank.rank
        for name, nothing in _NEUTRAL.items():
            stacked, value = getattr(self, name), getattr(low_rank, name)
            if stacked is None and value is None:
                continue
            if stacked is None:
                stacked = torch.full_like(self.bias, nothing)
                setattr(self, name, stacked)
            place = stacked[i] if name in ("read", "write") else stacked[i, 0]
            if value is not None:
                place[:rank] = value
            if value is None or rank < self.size[1]:
                place[0 if value is None else rank :] = nothing

    def move(self, i: int, to: int) -> None:
        """Copy map `i` over map `to`."""
        for stacked in self._tensors():
            stacked[to] = stacked[i]

    def resized(self, count: int, rank: int) -> MapStack:
        """A copy with space for at least as many maps, of at least this rank."""
        maps, (_, own_rank) = count - self.size[0], self.size
        more = max(0, rank - own_rank)
        pads = {"read": (0, 0, 0, more, 0, maps), "write": (0, 0, 0, more, 0, maps)}
        grown = {
            name: None if tensor is None else pad(tensor, pads.get(name, (0, more, 0, 0, 0, maps)), value=nothing)
            for name, nothing in _NEUTRAL.items()
            for tensor in (getattr(self, name),)
        }
        return MapStack(**grown)  # type: ignore[arg-type]

    def first(self, count: int) -> MapStack:
        """The first maps, as views."""
        return MapStack(*(None if each is None else each[:count] for each in self._each()))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> MapStack:
        """The stack on this device."""
        return MapStack(*(None if each is None else each.to(device) for each in self._each()))  # type: ignore[arg-type]

    def _each(self) -> tuple[Tensor | None, ...]:
        return self.read, self.bias, self.write, self.low, self.high

    def _tensors(self) -> list[Tensor]:
        return [tensor for tensor in self._each() if tensor is not None]


_NEUTRAL = {"read": 0.0, "bias": 0.0, "write": 0.0, "low": -torch.inf, "high": torch.inf}
"""The values with which a row of a stacked map does nothing, and a bound doesn't bind."""


@dataclass(frozen=True)
class BatchedMaps:
    """Maps with few tokens each: `slots[i]` are map i's tokens, `[maps, most]`, padded with its first token.

    `flat_indices` are the flat indices of the slots that aren't padding, and `tokens` the tokens in them.
    """

    stack: MapStack
    slots: Tensor
    flat_indices: Tensor
    tokens: Tensor

    def edit(self, x: Tensor, strength: Tensor) -> Tensor:
        """The new activations of `tokens`, for all tokens' `x` `[tokens, width]` and `strength` `[tokens, 1]`."""
        selected = x[self.slots]
        z = torch.baddbmm(self.stack.bias, selected, self.stack.read.mT)
        z = _clamped(z, self.stack.low, self.stack.high) * strength[self.slots]
        return torch.baddbmm(selected, z, self.stack.write).flatten(0, 1)[self.flat_indices]


def _clamped(z: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    return z if low is None and high is None else torch.clamp(z, low, high)
