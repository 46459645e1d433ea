"""Doses in vLLM's workers, where they are capped: against the definition, token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_parts
import torch
from test_parts import RULES, placed, rig, steering
from tiny import LAYERS, WIDTH, direction, naive_holds, naive_together

from trimtab import Add
from trimtab.engines.vllm.capacity import Capacity
from trimtab.engines.vllm.counting import DOSE
from trimtab.engines.vllm.doses import adds_only
from trimtab.engines.vllm.rig import Chunks, Rig
from trimtab.steering import Edit, Site, Steering

ADDED = (
    (1, Add(direction(1, 2.0)), RULES[3]),
    (1, Add(direction(2)), RULES[0]),
    (2, Add(direction(3)), RULES[5]),
    (3, Add(direction(4, 0.5)), RULES[2]),
)


def capped(one: Rig, request: str, given: Steering, cap: float | None) -> None:
    wire, content = placed(given, 5)
    one.steerings[wire.parts[0].digest] = content
    one.start(request, replace(wire, cap=cap))


def passes(one: Rig, given: Steering, others: list[str], chunk: int, pair: bool) -> tuple[list[float], list[Any]]:
    """The total dose after each pass by the definition, and what the rig finds wrong."""
    seed = torch.Generator().manual_seed(chunk)
    ratios: dict[int, list[float]] = {}
    totals, found = [], []
    for first in range(0, 12, chunk):
        names = [*others, "a"]
        one.begin(Chunks(names, [first] * len(names), [chunk] * len(names)))
        for layer in range(LAYERS):
            x, residual = torch.randn(2, len(names) * chunk, WIDTH, generator=seed, dtype=torch.float64)
            stream = x + residual if pair else x
            one.apply(Site(layer), x.clone(), residual if pair else None)
            for t in range(chunk):
                row = stream[len(others) * chunk + t]
                holding = [e for e in given.edits if e.site.layer == layer and naive_holds(e, first + t, 5)]
                if holding:
                    moved = (naive_together(holding, row) - row).norm() / row.norm()
                    ratios.setdefault(layer, []).append(float(moved))
        receipt = one.end()
        totals.append(sum(sum(each) / len(each) for each in ratios.values()))
        found.append({} if receipt is None else receipt.settle())
    return totals, found


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize(("static", "pair"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_request_ends_in_the_pass_that_takes_it_above_its_cap(static: bool, pair: bool, chunk: int) -> None:
    given = steering(*(ADDED if static else test_parts.TestRig.EDITS))
    cap = float("inf")
    for _ in range(2):
        one = rig(20, static) if not static else reading_rig()
        capped(one, "a", given, cap)
        capped(one, "b", 3.0 * given, None)
        totals, found = passes(one, given, ["b", "c"], chunk, pair)
        over = [total > cap for total in totals]
        assert [set(faults) for faults in found] == [{"a"} if each else set() for each in over]
        assert all(faults["a"].startswith(DOSE) for faults in found if faults)
        cap = sorted(totals)[len(totals) // 2] * (1 - 1e-5)  # the second time some are above it
    assert any(over)
    one.finish(["a", "b"])
    assert not one.doses.caps


def reading_rig() -> Rig:
    """One that replays captured graphs, which keep activations."""
    plain = rig(20, True)
    return Rig(plain.sites, plain.dtype, plain.device, plain.bank, True, Capacity(reads=True))


def test_only_the_worker_that_is_heard_measures() -> None:
    one = rig()
    one.doses.heard = False
    capped(one, "a", 1e6 * steering(*ADDED), 1e-9)
    _, found = passes(one, 1e6 * steering(*ADDED), [], 4, False)
    assert not any(found)


def test_what_only_adds() -> None:
    assert [adds_only(Edit(Site(layer), operation, where)) for layer, operation, where in test_parts.TestRig.EDITS] == [
        type(operation) is Add for _, operation, _ in test_parts.TestRig.EDITS
    ]
