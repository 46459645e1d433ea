"""The maps of a captured graph: the same operators in each step, which read banks on the device.

At each site, a bank holds the forms (see `forms`) of one state per slot; each token has the index of its state's slot,
or 0 for none. The effect of a token's slot is selected, never multiplied by zero: where a slot doesn't act, or a gate
is shut, the activation is unchanged bit for bit, regardless of the other slots.

In a pass with few tokens, each token's own map is gathered. In a pass with many tokens, where that would be the larger
copy, all tokens are multiplied by all maps, and each selects its own result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.vllm.bank import Slots, copy_to
from trimtab.engines.vllm.capacity import Capacity
from trimtab.engines.vllm.forms import Form
from trimtab.steering import Site
from trimtab.steering.operations import SHORTEST

TAIL = 5
"""A slot's last numbers, in order:

- the threshold: infinity if the slot doesn't act, minus infinity if it always does
- the share of the norm that is kept
- 1 if the threshold is in norms
- -1 if the absolute value of the projection counts, otherwise 1
- 1 for a negated condition
"""
GATHERED = 3
"""The cost of gathering a token's map (it is read, written and read again), in units of reading one slot's map."""


class Maps:
    """Banks at some sites; `index` is `[tokens]`, each token's slot.

    Args:
        capacity: What the maps can do; its rank is that of each map.
        sites: The sites that have maps, with the width of the activations there.
        slots: The number of states, including the empty one.
        tokens: The maximum number of tokens per pass.
        dtype: The model's dtype; the maps compute in at least float32.
        device: The model's device.
    """

    def __init__(
        self,
        capacity: Capacity,
        sites: Mapping[Site, int],
        slots: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        self.sites: dict[Site, int] = {site: i for i, site in enumerate(sites)}
        self.slots: Slots = Slots(slots, "TRIMTAB_MAPS")
        self.index: Tensor = torch.zeros(tokens, dtype=torch.long, device=device)
        self.dtype: torch.dtype = torch.promote_types(dtype, torch.float32)
        self._rows = capacity.rank + 1  # one for a vector, which reads nothing
        self._reads = self._rows + capacity.gates
        shape = (len(sites), capacity.steps, slots)
        made: dict[str, Any] = {"dtype": self.dtype, "device": device}
        vectors = self._reads + self._rows + capacity.scales  # rows that read, rows that write, and the scale minus 1
        self._vectors = [torch.zeros(capacity.steps, vectors, slots, width, **made) for width in sites.values()]
        self._numbers = torch.zeros(*shape, self._size, **made)
        self._numbers[..., -TAIL] = torch.inf
        self._unit = torch.ones((), **made)
        self._nothing = torch.full((), -0.0, **made)

    @property
    def _size(self) -> int:
        """The size of a slot: a bias for each row that reads, three numbers for each row that writes, and the tail."""
        return self._reads + 3 * self._rows + TAIL

    # ---- the contents of a slot --------------------------------------------------------------------------

    def acquire(self, key: str, forms: Mapping[Site, Sequence[Form]]) -> None:
        """Add a user to a state. Its forms are written if they aren't in the banks yet."""
        slot, new = self.slots.acquire(key)
        if not new:
            return
        numbers = torch.zeros(len(self.sites), self.capacity.steps, self._size, dtype=self.dtype)
        numbers[..., -TAIL] = torch.inf
        for site, several in forms.items():
            if site not in self.sites:  # on another pipeline stage
                continue
            at = self.sites[site]
            for step, form in enumerate(several):
                self._put(at, step, slot, form)
                numbers[at, step] = self._numbers_of(form)
        copy_to(numbers, self._numbers[:, :, slot])

    def release(self, key: str) -> None:
        self.slots.release(key)

    def _put(self, at: int, step: int, slot: int, form: Form) -> None:
        """Write a form's matrices, padded with zeros, which have no effect."""
        rank, vectors = len(form.read), self._vectors[at][step, :, slot]
        every = torch.zeros(vectors.shape, dtype=self.dtype)
        read, write, excess = every.split([self._reads, self._rows, int(self.capacity.scales)])
        read[:rank], write[:rank] = form.read, form.write
        if form.vector is not None:
            write[-1] = form.vector
        if form.gate is not None:
            read[-1] = form.gate.direction
        if form.factor is not None:
            excess[0] = form.factor - 1
        copy_to(every, vectors)

    def _numbers_of(self, form: Form) -> Tensor:
        rank, rows = len(form.read), self._rows
        numbers = torch.zeros(self._size, dtype=torch.float64)
        bias, per_norm, low, high, tail = numbers.split([self._reads, rows, rows, rows, TAIL])
        bias[:rank], per_norm[:rank], low[:rank], high[:rank] = form.bias, form.per_norm, form.low, form.high
        bias[rows - 1] = low[rows - 1] = high[rows - 1] = 1.0  # for the vector
        gate = form.gate
        tail[:] = torch.tensor([-torch.inf, form.keep_norm, 0, 1, 0])
        if gate is not None:
            tail[0], tail[2] = gate.threshold, gate.by_norm
            tail[3], tail[4] = -1 if gate.absolute else 1, gate.negated
        return numbers

    def banks(self, site: Site) -> tuple[Tensor, Tensor]:
        """A site's vectors `[steps, vectors, slots, width]` and numbers `[steps, slots, size]`."""
        at = self.sites[site]
        return self._vectors[at], self._numbers[at]

    # ---- the operators -----------------------------------------------------------------------------------

    def act(self, site: Site, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit the activation `hidden + residual`, `[tokens, width]` each, at a site, by changing `hidden` in place."""
        at, index = self.sites[site], self.index[: hidden.shape[0]]
        x = hidden.to(self.dtype)
        if residual is not None:
            x = x + residual
        delta = self._delta(at, 0, x, index)
        for step in range(1, self.capacity.steps):
            delta = delta + self._delta(at, step, x + delta, index)
        hidden.add_(delta)

    def _delta(self, at: int, step: int, x: Tensor, index: Tensor) -> Tensor:
        """What to add to each token's activation.

        If its slot doesn't act, that is `-0.0`, which leaves the activation unchanged bit for bit.
        """
        capacity, rows, reads = self.capacity, self._rows, self._reads
        numbers = self._numbers[at, step].index_select(0, index)
        bias, per_norm, low, high, tail = numbers.split([reads, rows, rows, rows, TAIL], dim=-1)
        vectors = self._vectors[at][step]
        few = GATHERED * len(index) <= vectors.shape[1]
        if few:
            vectors = vectors.index_select(1, index)
            z = torch.baddbmm(bias[..., None], vectors[:reads].transpose(0, 1), x[..., None])[..., 0]
        else:
            z = _select_own(x @ vectors[:reads].flatten(0, 1).T, reads, index) + bias
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) if capacity.norms else None
        threshold, share, by_norm, mirror, negated = tail.split(1, dim=-1)
        if capacity.gates:  # compare x.v or |x.v| with a threshold, which may be in norms of x
            value, least = z[:, rows:], threshold
            if length is not None:
                least = threshold * torch.lerp(self._unit, length, by_norm)
            acts = (torch.maximum(value, value * mirror) > least) != negated
            z = z[:, :rows]
        else:
            acts = threshold < 0
        if length is not None:
            z = torch.addcmul(z, per_norm, length)
        z = torch.clamp(z, low, high)
        write = vectors[reads : reads + rows]
        if few:
            delta = torch.bmm(z[:, None], write.transpose(0, 1))[:, 0]
        else:
            delta = _placed(z, vectors.shape[1], index) @ write.flatten(0, 1)
        if capacity.scales:
            excess = vectors[-1] if few else vectors[-1].index_select(0, index)
            delta = torch.addcmul(delta, x, excess)
        if length is not None:
            delta = _keep_norm(x, delta, length, share)
        return torch.where(acts, delta, self._nothing)


def _select_own(every: Tensor, rows: int, index: Tensor) -> Tensor:
    """Of the readings of all maps, `[tokens, rows * slots]`, those of each token's own map, `[tokens, rows]`."""
    each = every.view(len(index), rows, -1)
    return each.gather(2, index[:, None, None].expand(-1, rows, 1))[..., 0]


def _placed(z: Tensor, slots: int, index: Tensor) -> Tensor:
    """Scatter what each token's own map writes, `[tokens, rows]`, to that map's columns, `[tokens, rows * slots]`."""
    each = z.new_zeros(*z.shape, slots)
    return each.scatter_(2, index[:, None, None].expand(-1, z.shape[1], 1), z[..., None]).flatten(1)


def _keep_norm(x: Tensor, delta: Tensor, length: Tensor, share: Tensor) -> Tensor:
    """`delta`, adjusted so that x's norm, `length`, is kept by this share. At 0 it is `delta` bit for bit."""
    norm = torch.linalg.vector_norm(x + delta, dim=-1, keepdim=True)
    factor = torch.lerp(norm, length, share) / norm.clamp_min(SHORTEST)
    return torch.addcmul(delta * factor, x, factor - 1)
