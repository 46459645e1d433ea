"""Doses in vLLM's workers, where they are capped: against the definition, token by token."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import test_parts
import torch
from test_parts import RULES, placed, rig, steering
from tiny import LAYERS, WIDTH, direction, naive_holds, naive_together

from trimtab import Ablate, Add, ScaleKeys
from trimtab.engines.answer import Applied, Dose
from trimtab.engines.vllm.capacity import Capacity
from trimtab.engines.vllm.core import patch_scheduler
from trimtab.engines.vllm.counting import DOSE, DOSES, RECEIPT
from trimtab.engines.vllm.doses import adds_only
from trimtab.engines.vllm.frontend import Link, check_measured
from trimtab.engines.vllm.patched import patch_outputs
from trimtab.engines.vllm.program import State
from trimtab.engines.vllm.request_context import REQUEST_CONTEXT, RequestContext
from trimtab.engines.vllm.steering_manager import Chunks, SteeringManager
from trimtab.errors import UnsupportedError
from trimtab.steering import Edit, Site, Steering

ADDED = (
    (1, Add(direction(1, 2.0)), RULES[3]),
    (1, Add(direction(2)), RULES[0]),
    (2, Add(direction(3)), RULES[5]),
    (3, Add(direction(4, 0.5)), RULES[2]),
)


def capped(worker: SteeringManager, request: str, acting: Steering, cap: float | None) -> None:
    wire, content = placed(acting, 5)
    worker.steerings[wire.parts[0].digest] = content
    worker.start(request, replace(wire, cap=cap))


def passes(
    worker: SteeringManager, acting: Steering, others: list[str], chunk: int, pair: bool
) -> tuple[list[float], list[Any]]:
    """The total dose after each pass by the definition, and what the rig finds wrong."""
    seed = torch.Generator().manual_seed(chunk)
    ratios: dict[int, list[float]] = {}
    totals, receipts = [], []
    for first in range(0, 12, chunk):
        names = [*others, "a"]
        worker.begin(Chunks(names, [first] * len(names), [chunk] * len(names)))
        for layer in range(LAYERS):
            x, residual = torch.randn(2, len(names) * chunk, WIDTH, generator=seed, dtype=torch.float64)
            stream = x + residual if pair else x
            worker.apply(Site(layer), x.clone(), residual if pair else None)
            for t in range(chunk):
                row = stream[len(others) * chunk + t]
                holding = [e for e in acting.edits if e.site.layer == layer and naive_holds(e, first + t, 5)]
                if holding:
                    moved = (naive_together(holding, row) - row).norm() / row.norm()
                    ratios.setdefault(layer, []).append(float(moved))
        receipt = worker.end()
        totals.append(sum(sum(each) / len(each) for each in ratios.values()))
        receipts.append(({}, {}) if receipt is None else receipt.plain()[1:])
    return totals, receipts


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize(("static", "pair"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_request_ends_in_the_pass_that_takes_it_above_its_cap(static: bool, pair: bool, chunk: int) -> None:
    acting = steering(*(ADDED if static else test_parts.TestRig.EDITS))
    cap = float("inf")
    for _ in range(2):
        worker = rig(20, static) if not static else reading_rig()
        capped(worker, "a", acting, cap)
        capped(worker, "b", 3.0 * acting, None)
        totals, receipts = passes(worker, acting, ["b", "c"], chunk, pair)
        over = [total > cap for total in totals]
        assert [set(faults) for faults, _ in receipts] == [{"a"} if each else set() for each in over]
        assert all(faults["a"].startswith(DOSE) for faults, _ in receipts if faults)
        assert all(set(doses) <= {"a"} for _, doses in receipts)
        sent = [doses["a"] for _, doses in receipts if doses]
        assert [dose[0] for dose in sent[-1]] == sorted({edit.site.layer for edit in acting.edits})
        assert sum(dose[2] for dose in sent[-1]) == pytest.approx(totals[-1], rel=1e-5)
        cap = sorted(totals)[len(totals) // 2] * (1 - 1e-5)  # the second time some are above it
    assert any(over)
    worker.finish(["a", "b"])
    assert not worker.doses.caps


def reading_rig() -> SteeringManager:
    """One that replays captured graphs, which keep activations."""
    plain = rig(20, True)
    return SteeringManager(plain.sites, plain.dtype, plain.device, plain.bank, True, Capacity(reads=True))


def test_only_the_worker_that_is_heard_measures() -> None:
    worker = rig()
    worker.doses.reported = False
    capped(worker, "a", 1e6 * steering(*ADDED), 1e-9)
    _, receipts = passes(worker, 1e6 * steering(*ADDED), [], 4, False)
    assert receipts == [({}, {})] * len(receipts)


def test_scaled_keys_push_nothing() -> None:
    keys = Edit(Site(1, "keys"), ScaleKeys(100.0))
    both = State("", (keys, Edit(Site(1), Add(direction(1)))))
    assert both.pushed == {Site(1)}
    link = Link(8, LAYERS, WIDTH, True, unmeasured="", split=frozenset({"keys"}))
    check_measured(link, Steering((keys,)))
    with pytest.raises(UnsupportedError, match="only those of additions to the residual stream"):
        check_measured(link, Steering((Edit(Site(1), Ablate(direction(1))),)))


class Chunked(test_parts.Scheduler):
    """One that sends nothing of a pass that reads a part of a prompt."""

    def update_from_output(self, scheduled: Any, output: Any) -> dict[int, Any]:
        return {} if output.token is None else super().update_from_output(scheduled, output)


def test_doses_wait_for_an_output_to_go_with() -> None:
    """And nothing is kept of requests that are gone."""
    kind = type("Patched", (Chunked,), {})
    patch_scheduler(kind, test_parts.FAILURE)
    scheduler = kind(slots=8)
    scheduler.add_request(test_parts.request("a", steering(*ADDED)))

    def step(token: int | None, doses: dict[str, Any]) -> list[Any]:
        output = SimpleNamespace(token=token, **{RECEIPT: (1, {}, doses)})
        sent = scheduler.update_from_output(test_parts.Step({"a": 1}), output)
        return [getattr(each, "kv_transfer_params", None) for several in sent.values() for each in several.outputs]

    first, last = [(1, "residual", 0.5, 4)], [(1, "residual", 0.25, 8)]
    assert step(None, {"a": first, "gone": first}) == []
    assert step(5, {}) == [{DOSES: first}]
    assert step(5, {"a": last}) == [{DOSES: last}]
    assert step(5, {}) == [None]
    assert scheduler._trimtab_room.doses == {}


def test_a_ticket_hears_of_doses() -> None:
    """By the names under which the request was asked for, whichever its answer."""

    class Processor:
        """vLLM's `OutputProcessor`."""

        def __init__(self) -> None:
            self.request_states: dict[str, Any] = {}

        def add_request(self, request: Any, parent: Any = None, index: int = 0) -> None:
            state = SimpleNamespace(parent_req=parent, external_req_id=request.external, request_index=index)
            self.request_states[request.request_id] = state

        def process_outputs(self, outputs: list[Any]) -> list[Any]:
            return [each.kv_transfer_params for each in outputs]

    patch_outputs(Processor)
    processor, ticket = Processor(), RequestContext(None, "", nothing, 1.0)
    token = REQUEST_CONTEXT.set(ticket)
    processor.add_request(SimpleNamespace(request_id="1", external="x"))
    processor.add_request(SimpleNamespace(request_id="1_2", external="1_2"), SimpleNamespace(external_req_id="y"), 1)
    REQUEST_CONTEXT.reset(token)
    processor.add_request(SimpleNamespace(request_id="3", external="z"))
    doses = {DOSES: [[2, "mlp", 0.5, 3]]}
    outputs = [SimpleNamespace(request_id=name, kv_transfer_params=dict(doses)) for name in ("1", "1_2", "3", "gone")]
    assert processor.process_outputs(outputs) == [None] * 4
    assert ticket.doses == dict.fromkeys([("x", 0), ("y", 1)], (Dose(2, 0.5, 3, "mlp"),))
    assert ticket.applied(("y", 1)) == Applied((), (Dose(2, 0.5, 3, "mlp"),))


async def nothing() -> None:
    pass


def test_what_only_adds() -> None:
    assert [adds_only(Edit(Site(layer), operation, where)) for layer, operation, where in test_parts.TestRig.EDITS] == [
        type(operation) is Add for _, operation, _ in test_parts.TestRig.EDITS
    ]
