"""The maps of a captured graph: the same operators at each step, which read what stands in banks on the device.

A bank holds the forms (see `forms`) of as many states as there are slots, at each site; a token has the number of its
state's slot, and 0 for nothing. What a token's slot does to it is selected, never multiplied by zero: where a slot
doesn't act, or a gate is shut, the activation stays as it is bit for bit, whatever stands in other slots.

A pass of few tokens gathers each token's own map. In one of many, where that would be the larger copy, all tokens are
multiplied by all maps, and each takes its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.vllm.bank import Slots, send
from trimtab.engines.vllm.capacity import Capacity
from trimtab.engines.vllm.forms import Form
from trimtab.steering import Site
from trimtab.steering.operations import SHORTEST

TAIL = 5
"""A slot's last numbers: a threshold (infinite where it doesn't act, minus infinity where it always does), the share of
the norm that is kept, 1 for a threshold in norms, -1 where a projection's size counts and else 1, 1 for a negation."""
GATHERED = 3
"""What gathering costs for a token (its map is read, written and read again), in what reading a slot's map does."""


class Maps:
    """Banks at some sites; `index` is `[tokens]`, each token's slot.

    Args:
        capacity: What there is room for; its rank is that of each map.
        sites: Where there are maps, and the width of the activations there.
        slots: So many states, that of nothing among them.
        tokens: A pass's, at most.
        dtype: The model's; the maps compute in at least float32.
        device: Where the model is.
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
        vectors = self._reads + self._rows + capacity.scales  # what reads, what is written, and a scale less 1
        self._vectors = [torch.zeros(capacity.steps, vectors, slots, width, **made) for width in sites.values()]
        self._numbers = torch.zeros(*shape, self._size, **made)
        self._numbers[..., -TAIL] = torch.inf
        self._unit = torch.ones((), **made)
        self._nothing = torch.full((), -0.0, **made)

    @property
    def _size(self) -> int:
        """Of a slot's numbers: a bias for each row that reads, three more for each that writes, and the last few."""
        return self._reads + 3 * self._rows + TAIL

    # ---- what stands in a slot ---------------------------------------------------------------------------

    def take(self, key: str, forms: Mapping[Site, Sequence[Form]]) -> None:
        """One more user of a state, whose forms are written if they aren't there yet."""
        slot, new = self.slots.take(key)
        if not new:
            return
        numbers = torch.zeros(len(self.sites), self.capacity.steps, self._size, dtype=self.dtype)
        numbers[..., -TAIL] = torch.inf
        for site, several in forms.items():
            if site not in self.sites:  # another stage's
                continue
            at = self.sites[site]
            for step, form in enumerate(several):
                self._put(at, step, slot, form)
                numbers[at, step] = self._numbers_of(form)
        send(numbers, self._numbers[:, :, slot])

    def release(self, key: str) -> None:
        self.slots.release(key)

    def _put(self, at: int, step: int, slot: int, form: Form) -> None:
        """A form's matrices, filled up with zeros, which read and write nothing."""
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
        send(every, vectors)

    def _numbers_of(self, form: Form) -> Tensor:
        rank, rows = len(form.read), self._rows
        numbers = torch.zeros(self._size, dtype=torch.float64)
        bias, per_norm, low, high, tail = numbers.split([self._reads, rows, rows, rows, TAIL])
        bias[:rank], per_norm[:rank], low[:rank], high[:rank] = form.bias, form.per_norm, form.low, form.high
        bias[rows - 1] = low[rows - 1] = high[rows - 1] = 1.0  # the vector's
        gate = form.gate
        tail[:] = torch.tensor([-torch.inf, form.keep_norm, 0, 1, 0])
        if gate is not None:
            tail[0], tail[2] = gate.threshold, gate.by_norm
            tail[3], tail[4] = -1 if gate.either_way else 1, gate.negated
        return numbers

    def banks(self, site: Site) -> tuple[Tensor, Tensor]:
        """A site's vectors `[steps, vectors, slots, width]` and numbers `[steps, slots, size]`."""
        at = self.sites[site]
        return self._vectors[at], self._numbers[at]

    # ---- the operators -----------------------------------------------------------------------------------

    def act(self, site: Site, hidden: Tensor, residual: Tensor | None) -> None:
        """At a site whose activation is `hidden + residual`, `[tokens, width]` each: `hidden` takes the edit."""
        at, index = self.sites[site], self.index[: hidden.shape[0]]
        x = hidden.to(self.dtype)
        if residual is not None:
            x = x + residual
        delta = self._delta(at, 0, x, index)
        for step in range(1, self.capacity.steps):
            delta = delta + self._delta(at, step, x + delta, index)
        hidden.add_(delta)

    def _delta(self, at: int, step: int, x: Tensor, index: Tensor) -> Tensor:
        """What is added to each token's activation; `-0.0`, which leaves it bit for bit, where its slot doesn't
        act."""
        capacity, rows, reads = self.capacity, self._rows, self._reads
        numbers = self._numbers[at, step].index_select(0, index)
        bias, per_norm, low, high, tail = numbers.split([reads, rows, rows, rows, TAIL], dim=-1)
        vectors = self._vectors[at][step]
        few = GATHERED * len(index) <= vectors.shape[1]
        if few:
            vectors = vectors.index_select(1, index)
            z = torch.baddbmm(bias[..., None], vectors[:reads].transpose(0, 1), x[..., None])[..., 0]
        else:
            z = _own(x @ vectors[:reads].flatten(0, 1).T, reads, index) + bias
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) if capacity.norms else None
        threshold, share, by_norm, mirror, negated = tail.split(1, dim=-1)
        if capacity.gates:  # x.v or its size, against a threshold, which may be in norms of x
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
            delta = _kept(x, delta, length, share)
        return torch.where(acts, delta, self._nothing)


def _own(every: Tensor, rows: int, index: Tensor) -> Tensor:
    """Of what all maps read in each token, `[tokens, rows * slots]`, that of the token's own: `[tokens, rows]`."""
    each = every.view(len(index), rows, -1)
    return each.gather(2, index[:, None, None].expand(-1, rows, 1))[..., 0]


def _placed(z: Tensor, slots: int, index: Tensor) -> Tensor:
    """What each token's own map writes of, `[tokens, rows]`, where that map stands, `[tokens, rows * slots]`."""
    each = z.new_zeros(*z.shape, slots)
    return each.scatter_(2, index[:, None, None].expand(-1, z.shape[1], 1), z[..., None]).flatten(1)


def _kept(x: Tensor, delta: Tensor, length: Tensor, share: Tensor) -> Tensor:
    """What is added so that x's norm, `length`, is kept by this share. At 0 it is `delta`, bit for
    bit."""
    norm = torch.linalg.vector_norm(x + delta, dim=-1, keepdim=True)
    factor = torch.lerp(norm, length, share) / norm.clamp_min(SHORTEST)
    return torch.addcmul(delta * factor, x, factor - 1)
