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
        self._stack: tuple[list[int], _Stack] | None = None
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

    def _batch(self, numbers: list[int], tokens: Sequence[Tensor]) -> _BatchedMaps:
        if self._stack is None or self._stack[0] != numbers:
            self._stack = numbers, _Stack.of([self.maps[number] for number in numbers])
        stack = self._stack[1]
        most = max(map(len, tokens))
        slots = torch.stack([torch.cat([at, at[:1].expand(most - len(at))]) for at in tokens])
        flat_indices = torch.cat([torch.arange(len(at)) + most * i for i, at in enumerate(tokens)])
        device = stack.read.device
        return _BatchedMaps(stack, slots.to(device), flat_indices.to(device), torch.cat(list(tokens)).to(device))


@dataclass(frozen=True)
class SelectedMaps:
    """The maps of a pass's tokens: one for all, or each map with its tokens, indices into the flattened batch."""

    single: LowRank | None = None
    separate: Sequence[tuple[LowRank, Tensor]] = ()
    batched: _BatchedMaps | None = None

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


@dataclass(frozen=True)
class _Stack:
    """Several maps stacked, `[maps, rank, width]`. Maps of a smaller rank are padded with zeros, which do nothing."""

    read: Tensor
    bias: Tensor  # [maps, 1, rank], as are the bounds
    write: Tensor
    low: Tensor | None
    high: Tensor | None

    @classmethod
    def of(cls, maps: Sequence[LowRank]) -> _Stack:
        rank, width = max(low_rank.rank for low_rank in maps), maps[0].read.shape[1]
        new = maps[0].read.new_zeros
        read, write, bias = new(len(maps), rank, width), new(len(maps), rank, width), new(len(maps), 1, rank)
        for i, low_rank in enumerate(maps):
            read[i, : low_rank.rank], write[i, : low_rank.rank], bias[i, 0, : low_rank.rank] = (
                low_rank.read,
                low_rank.write,
                low_rank.bias,
            )
        low, high = [low_rank.low for low_rank in maps], [low_rank.high for low_rank in maps]
        return cls(read, bias, write, _bounds(low, bias, -torch.inf), _bounds(high, bias, torch.inf))


@dataclass(frozen=True)
class _BatchedMaps:
    """Maps with few tokens each: `slots[i]` are map i's tokens, `[maps, most]`, padded with its first token.

    `flat_indices` are the flat indices of the slots that aren't padding, and `tokens` the tokens in them.
    """

    stack: _Stack
    slots: Tensor
    flat_indices: Tensor
    tokens: Tensor

    def edit(self, x: Tensor, strength: Tensor) -> Tensor:
        """The new activations of `tokens`, for all tokens' `x` `[tokens, width]` and `strength` `[tokens, 1]`."""
        selected = x[self.slots]
        z = torch.baddbmm(self.stack.bias, selected, self.stack.read.mT)
        z = _clamped(z, self.stack.low, self.stack.high) * strength[self.slots]
        return torch.baddbmm(selected, z, self.stack.write).flatten(0, 1)[self.flat_indices]


def _bounds(bounds: Sequence[Tensor | None], like: Tensor, nothing: float) -> Tensor | None:
    """The bounds of several maps stacked, `[maps, 1, rank]`; `None` if no map has any."""
    if all(bound is None for bound in bounds):
        return None
    stacked = torch.full_like(like, nothing)
    for i, bound in enumerate(bounds):
        if bound is not None:
            stacked[i, 0, : len(bound)] = bound
    return stacked


def _clamped(z: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    return z if low is None and high is None else torch.clamp(z, low, high)
