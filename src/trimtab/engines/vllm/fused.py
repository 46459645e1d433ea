"""The operators of a captured graph at a site as one Triton kernel, with one program per token.

If a token's slots are the empty ones, its program ends after reading them, so unsteered tokens cost next to nothing.
The kernel does the same as `SteeringManager` and `Maps` do with torch's operators, in one pass over the activation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimtab.engines.vllm.bank import Bank
from trimtab.engines.vllm.counting import CALL, GraphCounts
from trimtab.engines.vllm.maps import TAIL, Maps
from trimtab.engines.vllm.steering_manager import SteeringManager
from trimtab.errors import TrimtabError
from trimtab.steering import Site
from trimtab.steering.operations import SHORTEST

WIDEST = 16384
"""The maximum width of an activation that one program holds."""


@triton.jit(do_not_specialize=["amount", "kept_rows"])
def steer_token(  # type: ignore[no-untyped-def]  # Triton's types are those of its compiler
    hidden,
    residual,
    rows,
    index,
    vectors,
    numbers,
    which,
    kept,
    count,
    amount,
    kept_rows,
    hidden_stride,
    residual_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    STEPS: tl.constexpr,
    READS: tl.constexpr,
    ROWS: tl.constexpr,
    ROOM: tl.constexpr,
    SIZE: tl.constexpr,
    VECTORS: tl.constexpr,
    TINY: tl.constexpr,
    PAIR: tl.constexpr,
    ADDS: tl.constexpr,
    MAPS: tl.constexpr,
    SCALES: tl.constexpr,
    NORMS: tl.constexpr,
    GATES: tl.constexpr,
    KEEPS: tl.constexpr,
):
    """Edit one token's activation: `hidden`, or with `PAIR` `hidden + residual`. The banks are those of `Maps`."""
    token = tl.program_id(0).to(tl.int64)
    if token == 0:
        tl.atomic_add(count, amount)
    row = token * 0
    slot = token * 0
    if ADDS:
        row = tl.load(index + token)
    if MAPS:
        slot = tl.load(which + token)
    if (row != 0) | (slot != 0) | KEEPS:
        column = tl.arange(0, BLOCK)
        inside = column < WIDTH
        new = tl.load(hidden + token * hidden_stride + column, mask=inside, other=0.0)
        if ADDS:
            vector = tl.load(rows + row * WIDTH + column, mask=inside, other=0.0)
            new = (new.to(tl.float32) + vector.to(tl.float32)).to(new.dtype)
        rest = tl.zeros([BLOCK], tl.float32)
        if PAIR:
            rest = tl.load(residual + token * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        if MAPS:  # noqa: SIM102
            if slot != 0:
                x = new.to(tl.float32) + rest if PAIR else new.to(tl.float32)
                total = tl.full([BLOCK], -0.0, tl.float32)
                at = tl.arange(0, ROOM)
                here = at < ROWS
                for step in tl.static_range(STEPS):
                    own = numbers + (step * SLOTS + slot) * SIZE
                    map_of = vectors + (step * VECTORS * SLOTS + slot) * WIDTH
                    z = tl.load(own + at, mask=here, other=0.0)
                    for r in range(ROWS):
                        read = tl.load(map_of + r * SLOTS * WIDTH + column, mask=inside, other=0.0)
                        z = tl.where(at == r, z + tl.sum(x * read, 0), z)
                    tail = own + READS + 3 * ROWS
                    threshold = tl.load(tail)
                    length = tl.full([], 1.0, tl.float32)
                    if NORMS:
                        length = tl.sqrt(tl.sum(x * x, 0))
                        z += tl.load(own + READS + at, mask=here, other=0.0) * length
                    if GATES:
                        gate = tl.load(map_of + ROWS * SLOTS * WIDTH + column, mask=inside, other=0.0)
                        value = tl.sum(x * gate, 0)
                        value = tl.maximum(value, value * tl.load(tail + 3), propagate_nan=tl.PropagateNan.ALL)
                        least = tl.where(tl.load(tail + 2) != 0, threshold * length, threshold)
                        acts = (value > least) != (tl.load(tail + 4) != 0)
                    else:
                        acts = threshold < 0
                    low = tl.load(own + READS + ROWS + at, mask=here, other=0.0)
                    high = tl.load(own + READS + 2 * ROWS + at, mask=here, other=0.0)
                    z = tl.maximum(z, low, propagate_nan=tl.PropagateNan.ALL)
                    z = tl.minimum(z, high, propagate_nan=tl.PropagateNan.ALL)
                    delta = tl.zeros([BLOCK], tl.float32)
                    for r in range(ROWS):
                        write = tl.load(map_of + (READS + r) * SLOTS * WIDTH + column, mask=inside, other=0.0)
                        delta += tl.sum(tl.where(at == r, z, 0.0), 0) * write
                    if SCALES:
                        delta += x * tl.load(map_of + (VECTORS - 1) * SLOTS * WIDTH + column, mask=inside, other=0.0)
                    if NORMS:
                        edited = x + delta
                        norm = tl.sqrt(tl.sum(edited * edited, 0))
                        factor = (norm + tl.load(tail + 1) * (length - norm)) / tl.maximum(norm, TINY)
                        delta = delta * factor + x * (factor - 1)
                    delta = tl.where(acts, delta, -0.0)
                    total += delta
                    x += delta
                new = (new.to(tl.float32) + total).to(new.dtype)
        tl.store(hidden + token * hidden_stride + column, new, mask=inside)
        if KEEPS:  # noqa: SIM102
            if token < kept_rows:
                stream = (new.to(tl.float32) + rest).to(new.dtype) if PAIR else new
                tl.store(kept + token * WIDTH + column, stream, mask=inside)


class Fused:
    """The kernel at each site of a manager: additions, maps, the count, and the activations that are kept for
    reading.
    """

    def __init__(self, bank: Bank, maps: Maps | None, counts: GraphCounts, kept: dict[Site, Tensor]) -> None:
        self._bank, self._maps, self._counts, self._kept = bank, maps, counts, kept

    def takes(self, hidden: Tensor, residual: Tensor | None) -> bool:
        """Whether the kernel supports these activations, `[tokens, width]`."""
        tensors = [hidden] if residual is None else [hidden, residual]
        fits = hidden.shape[-1] <= WIDEST and hidden.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return fits and all(tensor.stride(-1) == 1 and tensor.dtype == hidden.dtype for tensor in tensors)

    def act(self, site: Site, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit the activation `hidden + residual`, `[tokens, width]` each, at a site, by changing `hidden` in place."""
        tokens, width = hidden.shape
        if not tokens:
            self._counts.count(site, 0)
            return
        rows, kept, maps = self._bank.rows.get(site), self._kept.get(site), self._maps
        vectors, numbers = (hidden, hidden)
        if maps is not None and site in maps.sites:
            vectors, numbers = maps.banks(site)
        mapped = vectors is not hidden
        steer_token[(tokens,)](
            hidden,
            hidden if residual is None else residual,
            hidden if rows is None else rows,
            self._bank.index,
            vectors,
            numbers,
            maps.index if mapped and maps is not None else self._bank.index,
            hidden if kept is None else kept,
            self._counts.number_at(site),
            CALL + tokens,
            0 if kept is None else len(kept),
            hidden.stride(0),
            0 if residual is None else residual.stride(0),
            **constants(width, maps if mapped else None),
            PAIR=residual is not None,
            ADDS=rows is not None,
            KEEPS=kept is not None,
        )


def constants(width: int, maps: Maps | None) -> dict[str, Any]:
    """The compile-time constants of a kernel, except those that depend on which tensors are present."""
    common: dict[str, Any] = {"WIDTH": width, "BLOCK": triton.next_power_of_2(width), "TINY": SHORTEST}
    if maps is None:
        nothing = ("SLOTS", "STEPS", "READS", "ROWS", "ROOM", "SIZE", "VECTORS")
        return {**common, **dict.fromkeys(nothing, 1), **dict.fromkeys(("MAPS", "SCALES", "NORMS", "GATES"), False)}
    capacity, rows = maps.capacity, maps.capacity.rank + 1
    reads = rows + capacity.gates
    return {
        **common,
        "SLOTS": maps.slots.capacity,
        "STEPS": capacity.steps,
        "READS": reads,
        "ROWS": rows,
        "ROOM": triton.next_power_of_2(rows),
        "SIZE": reads + 3 * rows + TAIL,
        "VECTORS": reads + rows + capacity.scales,
        "MAPS": True,
        "SCALES": capacity.scales,
        "NORMS": capacity.norms,
        "GATES": capacity.gates,
    }


# ---- comparison with torch's operators ------------------------------------------------------------------------

NEAR = 1e-2
"""The tolerance, relative to how far torch's operators move an activation: more than the rounding of tensor cores."""


def check_fused(manager: SteeringManager) -> None:
    """Run the kernel and torch's operators on random banks of the manager's shapes, on its device.

    This also compiles the kernel, before a graph is captured.

    Raises:
        TrimtabError: They differ, or an activation that isn't steered changes.
    """
    kinds = {(site.kind, width, _operators_at(manager, site)): site for site, width in manager.sites.items()}
    for site in kinds.values():
        managers = [_random_manager(manager, site) for _ in range(2)]
        fused = Fused(managers[0].bank, managers[0].maps, managers[0].counts, managers[0].kept)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(1)
        pair = site.kind == "residual"
        hidden, residual = torch.randn(2, 12, manager.sites[site], generator=generator).to(
            manager.device, manager.dtype
        )
        actual, wanted = hidden.clone(), hidden.clone()
        if not fused.takes(actual, residual):
            raise TrimtabError(f"it doesn't support {manager.dtype} of width {manager.sites[site]}")
        fused.act(site, actual, residual if pair else None)
        managers[1].apply(site, wanted, residual if pair else None)
        moved = (wanted - hidden).float().norm(dim=-1)
        apart = (actual - wanted).float().norm(dim=-1)
        rounded = torch.finfo(manager.dtype).eps * wanted.float().norm(dim=-1)
        idle = moved == 0
        near = bool((apart <= NEAR * moved + rounded).all())  # false for NaN
        if not near or not torch.equal(actual[idle], hidden[idle]):
            raise TrimtabError(
                f"at {site} it differs from torch's operators by {float((apart / rounded).max()):.3g} eps"
            )
        if not torch.equal(managers[0].counts.number_at(site), managers[1].counts.number_at(site)):  # type: ignore[union-attr]
            raise TrimtabError(f"at {site} its counts differ from those of torch's operators")


def _operators_at(manager: SteeringManager, site: Site) -> tuple[bool, bool]:
    return site in manager.bank.rows, manager.maps is not None and site in manager.maps.sites


def _random_manager(manager: SteeringManager, site: Site) -> SteeringManager:
    """A manager like this one with a single site and random banks, the same in each call."""
    generator = torch.Generator().manual_seed(0)
    rows, mapped = _operators_at(manager, site)
    width, tokens = manager.sites[site], 16
    bank = Bank([site.layer] if rows else [], width, manager.bank.slots.capacity, tokens, manager.dtype, manager.device)
    maps = None
    if mapped and manager.maps is not None:
        slots = manager.maps.slots.capacity
        maps = Maps(manager.capacity, {site: width}, slots, tokens, manager.dtype, manager.device)
        vectors, numbers = maps.banks(site)
        vectors[:, :, 1:] = (torch.randn(vectors[:, :, 1:].shape, generator=generator) / width**0.5).to(manager.device)
        drawn = torch.rand(numbers[:, 1:].shape, generator=generator)
        reads, rows_of = numbers.shape[-1] - TAIL - 3 * (manager.capacity.rank + 1), manager.capacity.rank + 1
        drawn[..., reads + rows_of : reads + 2 * rows_of] -= 1  # makes `low` smaller than `high`
        tail = drawn[..., -TAIL:]
        tail[..., 0] = torch.where(tail[..., 0] < 0.5, -torch.inf, tail[..., 0] - 0.5)
        tail[..., 2:] = torch.where(tail[..., 2:] < 0.5, 0.0, 1.0)
        tail[..., 3] = 1 - 2 * tail[..., 3]
        numbers[:, 1:] = drawn.to(manager.device)
        maps.index[:12] = torch.tensor([0, 1, 0, 1] * 3) % slots
    for row in bank.rows.values():
        row[1:] = torch.randn(row[1:].shape, generator=generator).to(manager.device, manager.dtype)
    bank.index[:12] = torch.tensor([0, 0, 1, 1] * 3)
    capacity = replace(manager.capacity, layers=None)
    return SteeringManager({site: width}, manager.dtype, manager.device, bank, True, capacity, maps, tokens)
