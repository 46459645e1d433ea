"""The maps of a captured graph: the same operators at each step, which read what stands in banks on the device.

A bank holds the forms (see `forms`) of as many states as there are slots, at each block; a token has the number of its
state's slot, and 0 for nothing. What a token's slot does to it is selected, never multiplied by zero: where a slot
doesn't act, or a gate is shut, the activation stays as it is to the bit, whatever stands in other slots.

A pass of few tokens gathers each token's own map. In one of many, where that would be the larger copy, all tokens are
multiplied by all maps, and each takes its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trimtab.engines.vllm.bank import Slots, send, to_device
from trimtab.engines.vllm.capacity import Capacity
from trimtab.engines.vllm.forms import Form
from trimtab.steering.operations import SHORTEST

GATHERED = 3
"""What gathering costs for a token (its map is read, written and read again), in what reading a slot's map does."""


class Maps:
    """Banks at some blocks; `index` is `[tokens]`, each token's slot.

    Args:
        capacity: What there is room for; its rank is that of each map.
        layers: The blocks behind which there are maps.
        width: The activations'.
        slots: So many states, that of nothing among them.
        tokens: A pass's, at most.
        dtype: The model's; the maps compute in at least float32.
        device: Where the model is.
    """

    def __init__(
        self,
        capacity: Capacity,
        layers: Sequence[int],
        width: int,
        slots: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        self.layers = {layer: i for i, layer in enumerate(layers)}
        self.slots = Slots(slots, "TRIMTAB_MAPS")
        self.index = torch.zeros(tokens, dtype=torch.long, device=device)
        self.dtype = torch.promote_types(dtype, torch.float32)
        self._rows = capacity.rank + 1  # one for a vector, which reads nothing
        self._reads = self._rows + capacity.gates
        shape = (len(layers), capacity.steps, slots)
        made = {"dtype": self.dtype, "device": device}
        self._read = torch.zeros(*shape, self._reads, width, **made)  # type: ignore[arg-type]
        self._write = torch.zeros(*shape, self._rows, width, **made)  # type: ignore[arg-type]
        self._excess = torch.zeros(*shape, width, **made) if capacity.scales else None  # type: ignore[arg-type]
        self._numbers = torch.zeros(*shape, self._size, **made)  # type: ignore[arg-type]
        self._nothing = torch.full((), -0.0, **made)  # type: ignore[arg-type]

    @property
    def _size(self) -> int:
        """Of a slot's numbers: a bias for each row that reads, three more for each that writes, and `_tail`."""
        return self._reads + 3 * self._rows + 6

    # ---- what stands in a slot ---------------------------------------------------------------------------

    def take(self, key: str, forms: Mapping[int, Sequence[Form]]) -> None:
        """One more user of a state, whose forms are written if they aren't there yet."""
        slot, new = self.slots.take(key)
        if not new:
            return
        numbers = torch.zeros(len(self.layers), self.capacity.steps, self._size, dtype=self.dtype)
        for layer, several in forms.items():
            if layer not in self.layers:  # another stage's
                continue
            at = self.layers[layer]
            for step, form in enumerate(several):
                self._put(at, step, slot, form)
                numbers[at, step] = self._numbers_of(form)
        send(numbers, self._numbers[:, :, slot])

    def release(self, key: str) -> None:
        """One user less."""
        self.slots.release(key)

    def _put(self, at: int, step: int, slot: int, form: Form) -> None:
        """A form's matrices, filled up with zeros, which read and write nothing."""
        rank = len(form.read)
        width = self._read.shape[-1]
        both = torch.zeros(self._reads + self._rows + 1, width, dtype=self.dtype)
        read, write, excess = both.split([self._reads, self._rows, 1])
        read[:rank], write[:rank] = form.read, form.write
        if form.vector is not None:
            write[-1] = form.vector
        if form.gate is not None:
            read[-1] = form.gate.direction
        if form.factor is not None:
            excess[0] = form.factor - 1
        sent = to_device(both, self._read.device)  # one copy
        self._read[at, step, slot] = sent[: self._reads]
        self._write[at, step, slot] = sent[self._reads : -1]
        if self._excess is not None:
            self._excess[at, step, slot] = sent[-1]

    def _numbers_of(self, form: Form) -> Tensor:
        rank, rows = len(form.read), self._rows
        found = torch.zeros(self._size, dtype=torch.float64)
        bias, per_norm, low, high, tail = found.split([self._reads, rows, rows, rows, 6])
        bias[:rank], per_norm[:rank], low[:rank], high[:rank] = form.bias, form.per_norm, form.low, form.high
        bias[rows - 1] = low[rows - 1] = high[rows - 1] = 1.0  # the vector's
        gate = form.gate
        tail[0], tail[1] = 1.0, form.keep_norm
        tail[2] = -torch.inf if gate is None else gate.threshold
        if gate is not None:
            tail[3], tail[4], tail[5] = gate.by_norm, gate.either_way, gate.negated
        return found

    # ---- the operators -----------------------------------------------------------------------------------

    def act(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """Behind a block whose output is `hidden + residual`, `[tokens, width]` each: `hidden` takes the edit."""
        at, index = self.layers[layer], self.index[: hidden.shape[0]]
        x = hidden.to(self.dtype)
        if residual is not None:
            x = x + residual
        total = None
        for step in range(self.capacity.steps):
            delta = self._delta(at, step, x, index)
            total = delta if total is None else total + delta
            if step + 1 < self.capacity.steps:
                x = x + delta
        hidden.add_(total)

    def _delta(self, at: int, step: int, x: Tensor, index: Tensor) -> Tensor:
        """What is added to each token's activation; `-0.0`, which leaves it to the bit, where its slot doesn't act."""
        capacity, rows, reads = self.capacity, self._rows, self._reads
        numbers = self._numbers[at, step].index_select(0, index)
        bias, per_norm, low, high, tail = numbers.split([reads, rows, rows, rows, 6], dim=-1)
        few = GATHERED * len(index) <= self._read.shape[2]
        z = self._gathered(at, step, x, index, bias) if few else self._multiplied(at, step, x, index, bias)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) if capacity.norms else None
        acts = tail[:, :1] > 0
        if capacity.gates:
            acts = acts & _holds(z[:, rows:], length, tail)
        z = z[:, :rows]
        if length is not None:
            z = torch.addcmul(z, per_norm, length)
        z = torch.clamp(z, low, high)
        delta = self._written(at, step, z, index, few)
        if self._excess is not None:
            delta = torch.addcmul(delta, x, self._excess[at, step].index_select(0, index))
        if length is not None:
            delta = _kept(x, delta, length, tail[:, 1:2])
        return torch.where(acts, delta, self._nothing)

    def _gathered(self, at: int, step: int, x: Tensor, index: Tensor, bias: Tensor) -> Tensor:
        read = self._read[at, step].index_select(0, index)
        return torch.baddbmm(bias[..., None], read, x[..., None])[..., 0]

    def _multiplied(self, at: int, step: int, x: Tensor, index: Tensor, bias: Tensor) -> Tensor:
        slots, reads = self._read.shape[2], self._reads
        every = (x @ self._read[at, step].flatten(0, 1).T).view(-1, slots, reads)
        own = every.gather(1, index[:, None, None].expand(-1, 1, reads))
        return own[:, 0] + bias

    def _written(self, at: int, step: int, z: Tensor, index: Tensor, few: bool) -> Tensor:
        if few:
            return torch.bmm(z[:, None], self._write[at, step].index_select(0, index))[:, 0]
        slots, rows = self._write.shape[2], self._rows
        every = z.new_zeros(len(z), slots, rows)
        every.scatter_(1, index[:, None, None].expand(-1, 1, rows), z[:, None])
        return every.flatten(1) @ self._write[at, step].flatten(0, 1)


def _holds(value: Tensor, length: Tensor | None, tail: Tensor) -> Tensor:
    """Whether each token's condition does: `[tokens, 1]`, for what it reads, `value`."""
    threshold, by_norm, either_way, negated = tail[:, 2:].split(1, dim=-1)
    if length is not None:
        value = torch.where(by_norm > 0, value / length.clamp_min(SHORTEST), value)
    value = torch.where(either_way > 0, value.abs(), value)
    return (value > threshold) ^ (negated > 0)


def _kept(x: Tensor, delta: Tensor, length: Tensor, share: Tensor) -> Tensor:
    """What is added so that x's norm, `length`, is kept by this share. At 0 it is `delta`, to the bit."""
    norm = torch.linalg.vector_norm(x + delta, dim=-1, keepdim=True)
    factor = torch.lerp(norm, length, share) / norm.clamp_min(SHORTEST)
    return torch.addcmul(delta * factor, x, factor - 1)
