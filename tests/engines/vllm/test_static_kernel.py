"""The operators of captured graphs, without a GPU: captured once, then replayed, without Python, for other mixes.

What they give is compared with the textbook formulas, token by token in float64, and with the same rig run in Python.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pretend_gpu import GPUS, on_gpu, pretending
from test_parts import RULES, Recorded, placed, start, steering
from tiny import LAYERS, WIDTH, direction, naive_holds, naive_together, read_write
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab import (
    Ablate,
    Add,
    Edit,
    Positions,
    ScaleElements,
    Site,
    Steering,
    Threshold,
    TrimtabError,
    UnsupportedError,
)
from trimtab.engines.vllm.admission import check_supported
from trimtab.engines.vllm.attach import Place, attach
from trimtab.engines.vllm.bank import Bank
from trimtab.engines.vllm.capacity import KERNELS, Capacity, capacity_from
from trimtab.engines.vllm.forms import capacity_for, check_fits, forms_of
from trimtab.engines.vllm.maps import Maps
from trimtab.engines.vllm.program import State
from trimtab.engines.vllm.steering_manager import Chunks, SteeringManager
from trimtab.engines.vllm.wire import Reading, Wire
from trimtab.steering import AddScaled, RotateInPlane, RotatePredicted, SetProjection
from trimtab.steering.gates import Gate
from trimtab.steering.rotations import Rotate, weight_count

ALL = replace(KERNELS["all"], rank=8, steps=3)
GATES: list[Gate] = [
    Threshold(Site(1), direction(70), 0.2, each_token=True),
    ~Threshold(Site(1), direction(71), 0.1, each_token=True),
    Threshold(Site(1), direction(72, 3.0), 0.05, "cosine", each_token=True),
    Threshold(Site(1), direction(73), 0.1, "ratio", each_token=True),
    Threshold(Site(1), direction(74), 0.4, "probability", bias=-0.2, each_token=True),
]
OPERATIONS = [
    Add(direction(1, 2.0)),
    SetProjection(direction(2), target=1.5),
    SetProjection(direction(3), target=0.3, one_sided=True),
    Ablate(direction(4)),
    ScaleElements((direction(5) > 0.1).double()),
    read_write(6, 3, low=0.0),
    read_write(7, 2, high=0.5),
    RotateInPlane(direction(8), direction(9), angle=0.7),
    Rotate(direction(10), one_sided=False),
    AddScaled(direction(11), by="norm"),
    AddScaled(direction(12), by="opposed", keep_norm=True),
    Add(direction(13), keep_norm=True),
    Ablate(direction(14), keep_norm=0.5),
    read_write(15, 2, keep_norm=1.0),
]


def static_rig(
    capacity: Capacity = ALL,
    slots: int = 40,
    maps: int = 40,
    captured: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> SteeringManager:
    bank = Bank(range(LAYERS), WIDTH, slots, 256, dtype, device)
    sites = {Site(layer): WIDTH for layer in range(LAYERS)}
    here = {site: width for site, width in sites.items() if capacity.at(site.layer)}
    mapped = Maps(capacity, here, maps, 256, dtype, device) if here else None
    return SteeringManager(sites, dtype, device, bank, True, capacity, mapped, captured)


def in_python(slots: int = 40, dtype: torch.dtype = torch.float64) -> SteeringManager:
    device = torch.device("cpu")
    return SteeringManager(
        {Site(layer): WIDTH for layer in range(LAYERS)},
        dtype,
        device,
        Bank(range(LAYERS), WIDTH, slots, 256, dtype, device),
    )


class Graph:
    """The operators behind all blocks, captured for passes of so many tokens; and replayed, which runs no Python."""

    def __init__(self, worker: SteeringManager, tokens: int, pair: bool = True) -> None:
        shape = (LAYERS, tokens, WIDTH)
        self.hidden = torch.zeros(shape, dtype=worker.dtype)
        self.residual = torch.zeros(shape, dtype=worker.dtype) if pair else None
        with Recorded() as self.graph:
            for layer in range(LAYERS):
                worker.apply(Site(layer), self.hidden[layer], None if self.residual is None else self.residual[layer])

    def replay(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        self.hidden.copy_(hidden)
        if self.residual is not None:
            self.residual.copy_(residual)
        self.graph.replay()
        return self.hidden.clone()


def edits_of(acting: Steering | None, layer: int, t: int, prompt: int) -> list[Edit]:
    return [e for e in (acting.edits if acting else ()) if e.site.layer == layer and naive_holds(e, t, prompt)]


class TestForms:
    """Of each operation, and of several in a row, the folded form is the formula."""

    def value(self, acting: Steering, x: torch.Tensor) -> torch.Tensor:
        worker = static_rig()
        start(worker, "a", acting, 1)
        worker.begin(Chunks(["a"], [0], [len(x)]))
        new = x.clone()
        worker.apply(Site(1), new, None)
        return new

    @pytest.mark.parametrize("strength", [1.0, 0.4, -1.5])
    @pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{type(o).__name__} {o.keep_norm:g}")
    @pytest.mark.parametrize("gate", [None, *GATES], ids=str)
    def test_it_is_what_python_does(self, operation: Any, strength: float, gate: Gate | None) -> None:
        if isinstance(operation, Rotate) and strength != 1:
            return  # a reflection in part isn't linear
        acting = strength * Steering((Edit(Site(1), operation, Positions.all()),))
        acting = acting if gate is None else acting.when(gate)
        x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        plain, wanted = in_python(), x.clone()
        start(plain, "a", acting, 1)
        plain.begin(Chunks(["a"], [0], [7]))
        plain.apply(Site(1), wanted, None)
        result = self.value(acting, x)
        torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-9)
        stays = (wanted == x).all(-1)
        assert torch.equal(result[stays], x[stays])
        if gate is not None:
            assert 0 < int(stays.sum()) < 7

    @pytest.mark.parametrize("seed", range(40))
    def test_edits_in_a_row_fold(self, seed: int) -> None:
        chosen = random.Random(seed)
        several = [o for o in OPERATIONS if not o.keep_norm or chosen.random() < 0.2]
        picked = [(1, chosen.choice(several), RULES[0]) for _ in range(chosen.randint(2, 4))]
        acting = chosen.choice([1.0, 0.5]) * steering(*picked)
        acting = Steering(tuple(e for e in acting.edits if not isinstance(e.operation, Rotate) or e.strength == 1))
        state = State("", acting.edits)
        try:
            capacity_for(acting)
            slots = state.slots.get(Site(1), [])
        except TrimtabError:
            return  # clamps of one direction to two ends
        if not slots:
            return
        try:
            forms = forms_of(slots)
        except TrimtabError:
            return
        assert len(forms) <= len(slots)
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        capacity = replace(ALL, rank=24, steps=4)
        plain, fixed = in_python(), static_rig(capacity)
        new = []
        for worker in (plain, fixed):
            start(worker, "a", acting, 1)
            worker.begin(Chunks(["a"], [0], [5]))
            new.append(x.clone())
            worker.apply(Site(1), new[-1], None)
        torch.testing.assert_close(new[1], new[0], rtol=1e-8, atol=1e-8)

    def test_what_folds_is_one_form(self) -> None:
        """Additions, projections, maps and scales do; what reads a clamp's outcome, or keeps a norm, doesn't."""
        add, clamp, ablate = Add(direction(1)), read_write(2, 2, low=0.0), Ablate(direction(3))
        scale = ScaleElements((direction(5) > 0.1).double())

        def count(*operations: Any) -> int:
            return len(forms_of(State("", steering(*((1, o, RULES[0]) for o in operations)).edits).slots[Site(1)]))

        assert count(add, ablate, scale, add, clamp) == 1
        assert count(clamp, add, scale) == 1
        assert count(clamp, ablate) == 2
        assert count(add, Add(direction(1), keep_norm=True)) == 2
        assert count(clamp, clamp, ablate) == 3


def mixes(seed: int, count: int) -> list[Steering]:
    """Different steerings, each of one or a few edits at a few layers and positions."""
    chosen = random.Random(seed)
    made = []
    for number in range(count):
        edits = []
        for _ in range(chosen.randint(1, 3)):
            operation = chosen.choice(OPERATIONS)
            if isinstance(operation, (Add, Ablate)):
                operation = replace(operation, direction=direction(100 + 7 * number + chosen.randint(0, 6)))
            where = chosen.choice(RULES)
            gated = chosen.random() < 0.25
            layer = 1 if gated else chosen.randrange(LAYERS)
            edit = Edit(Site(layer), operation, where, 1.0)
            edits.append(replace(edit, gate=chosen.choice(GATES)) if gated else edit)
        made.append(Steering(tuple(edits)))
    return made


class TestReplays:
    """One capture serves every mix: requests join, leave, are preempted and go on, and slots are used again."""

    @pytest.mark.parametrize(("tokens", "maps"), [(48, 120), (48, 150)], ids=["many tokens", "few"])
    @pytest.mark.parametrize("pair", [True, False], ids=["pair", "tensor"])
    def test_each_mix_is_what_python_does(self, tokens: int, maps: int, pair: bool) -> None:
        fixed, plain = static_rig(maps=maps), in_python()
        graph = Graph(fixed, tokens, pair)
        seed = torch.Generator().manual_seed(tokens)
        chosen = random.Random(maps)
        steerings, alive, at = mixes(1, 70), {}, {}
        waiting = list(range(len(steerings)))
        prompt = 3
        for _step in range(24):
            for name in [name for name in alive if chosen.random() < 0.15]:
                for worker in (fixed, plain):
                    worker.finish([name])
                del alive[name], at[name]
            while waiting and len(alive) < 32:
                number = waiting.pop()
                alive[str(number)] = steerings[number] if number % 5 else None
                at[str(number)] = 0
                for worker in (fixed, plain):
                    if alive[str(number)] is not None:
                        start(worker, str(number), steerings[number], prompt)
            for name in alive:
                if chosen.random() < 0.05:  # preempted: it starts again
                    at[name] = 0
                    for worker in (fixed, plain):
                        worker.resume([name])
            here = [name for name in alive if chosen.random() < 0.9]
            chunk = {name: min(prompt - at[name], 2) if at[name] < prompt else 1 for name in here}
            while sum(chunk.values()) > tokens:
                chunk.pop(here.pop())
            if not here:
                continue
            chunks = Chunks(here, [at[name] for name in here], [chunk[name] for name in here])
            hidden = torch.randn(LAYERS, tokens, WIDTH, generator=seed, dtype=torch.float64)
            residual = torch.randn(hidden.shape, generator=seed, dtype=torch.float64) if pair else None
            for worker in (fixed, plain):
                worker.expect(dict.fromkeys(here, 1))
                worker.begin(chunks)
            result = graph.replay(hidden, residual)
            receipt = fixed.end()
            assert receipt is None or receipt.resolve_faults() == {}
            wanted = hidden.clone()
            for layer in range(LAYERS):
                plain.apply(Site(layer), wanted[layer], None if residual is None else residual[layer])
            plain.end()
            torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-9)
            row = 0
            for name in here:
                for t in range(at[name], at[name] + chunk[name]):
                    for layer in range(LAYERS):
                        edits = edits_of(alive[name], layer, t, prompt)
                        if all(
                            type(e.operation) is Add and not e.operation.keep_norm and not e.gate.sites for e in edits
                        ):
                            assert torch.equal(result[layer, row], wanted[layer, row])  # nothing, or additions
                    row += 1
                at[name] += chunk[name]
            assert torch.equal(result[:, row:], hidden[:, row:])
        assert not waiting
        for worker in (fixed, plain):
            worker.finish(list(alive))
        assert fixed.bank.slots.used == fixed.maps.slots.used == 0

    @pytest.mark.parametrize("chunk", [1, 3, 12])
    def test_a_mixed_batch_is_the_textbook_formula_token_by_token(self, chunk: int) -> None:
        edits = [
            (1, Add(direction(1, 2.0)), RULES[3]),
            (1, SetProjection(direction(2), target=1.5), RULES[0]),
            (1, Add(direction(7)), RULES[2]),
            (2, Add(direction(8)), RULES[0]),
            (3, Ablate(direction(6), keep_norm=True), RULES[4]),
            (0, read_write(1, 3, low=0.0), RULES[0]),
            (3, read_write(2, 5, keep_norm=0.5), RULES[3]),
        ]
        worker = static_rig()
        steerings = {"a": steering(*edits), "b": None, "c": 0.5 * steering(*edits[3:])}
        for name, what in steerings.items():
            if what is not None:
                start(worker, name, what, 5)
        graph, seed = Graph(worker, 3 * chunk + 2), torch.Generator().manual_seed(chunk)
        for first in range(0, 12, chunk):
            worker.begin(Chunks(list(steerings), [first] * 3, [chunk] * 3))
            hidden, residual = torch.randn(2, LAYERS, 3 * chunk + 2, WIDTH, generator=seed, dtype=torch.float64)
            new = graph.replay(hidden, residual)
            worker.end()
            for row in range(3 * chunk):
                name, t = "abc"[row // chunk], first + row % chunk
                for layer in range(LAYERS):
                    holding, x = edits_of(steerings[name], layer, t, 5), hidden[layer, row] + residual[layer, row]
                    if holding:
                        result = new[layer, row] + residual[layer, row]
                        torch.testing.assert_close(result, naive_together(holding, x), rtol=1e-9, atol=1e-9)
                    else:
                        assert torch.equal(new[layer, row], hidden[layer, row])

    def test_traced_operators_are_those_of_any_mix(self) -> None:
        """What `make_fx` has written down is a graph of ATen's operators alone, and does what Python does."""
        fixed, plain = static_rig(), in_python()

        def steered(hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            new = hidden.clone()
            fixed.apply(Site(1), new, residual)
            return new

        hidden, residual = torch.randn(2, 6, WIDTH, dtype=torch.float64)
        traced = make_fx(steered)(hidden, residual)
        assert all(
            "aten" in str(n.target) or "getitem" in str(n.target) for n in traced.graph.nodes if n.op == "call_function"
        )
        for number, acting in enumerate(mixes(2, 12)):
            for worker in (fixed, plain):
                start(worker, str(number), acting, 3)
                worker.begin(Chunks([str(number)], [0], [6]))
            wanted = hidden.clone()
            plain.apply(Site(1), wanted, residual)
            torch.testing.assert_close(traced(hidden, residual), wanted, rtol=1e-9, atol=1e-9)
            for worker in (fixed, plain):
                worker.end()
                worker.finish([str(number)])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_in_the_models_dtype(self, dtype: torch.dtype) -> None:
        """To the bit where there are additions alone; else within what the dtype rounds."""
        fixed, plain = static_rig(dtype=dtype, slots=80, maps=80), in_python(80, dtype)
        graph, steerings = Graph(fixed, 40), mixes(3, 20)
        for i, what in enumerate(steerings):
            for worker in (fixed, plain):
                start(worker, str(i), what, 3)
        names = [str(i) for i in range(len(steerings))]
        hidden, residual = torch.randn(2, LAYERS, 40, WIDTH).to(dtype)
        for worker in (fixed, plain):
            worker.begin(Chunks(names, [0] * 20, [2] * 20))
        result, wanted = graph.replay(hidden, residual), hidden.clone()
        for layer in range(LAYERS):
            plain.apply(Site(layer), wanted[layer], residual[layer])
            adds = {i for i, what in enumerate(steerings) if layer not in _staged(what)}
            rows = [2 * i + k for i in adds for k in (0, 1)]
            assert torch.equal(result[layer, rows], wanted[layer, rows])
        stream = (result.float() + residual.float(), wanted.float() + residual.float())
        near = 2e-4 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(*stream, rtol=near, atol=near)

    @pytest.mark.parametrize("tokens", [2, 60], ids=["gathered", "all maps"])
    def test_a_large_rank(self, tokens: int) -> None:
        """Ranks of 64, 30 and 1 beside each other; smaller ones are filled up with rows that read and write nothing."""
        fixed, plain = static_rig(replace(ALL, rank=64), maps=9), in_python()
        count = tokens // 2
        names = ["a", "b"] if count < 20 else ["a", "b", "c"]
        for name, rank in zip(names, (64, 30, 1), strict=False):
            for worker in (fixed, plain):
                start(worker, name, steering((1, read_write(rank, rank, low=-0.5, high=2.0), RULES[0])), 3)
        graph = Graph(fixed, tokens)
        hidden, residual = torch.randn(2, LAYERS, tokens, WIDTH, dtype=torch.float64)
        wanted = hidden.clone()
        for worker in (fixed, plain):
            worker.begin(Chunks(names, [0] * len(names), [tokens // len(names)] * len(names)))
        plain.apply(Site(1), wanted[1], residual[1])
        torch.testing.assert_close(graph.replay(hidden, residual), wanted, rtol=1e-9, atol=1e-9)


def _staged(acting: Steering) -> set[int]:
    return {site.layer for site in State("", acting.edits).staged}


class TestNothingLeaks:
    def test_a_shut_gate_and_another_slots_numbers_leave_an_activation_to_the_bit(self) -> None:
        """Negative zeros, infinities and NaN stay as they are; and what is NaN in one token is nothing to others."""
        for maps in (4, 200):  # all tokens by all maps, and each its own
            worker = static_rig(maps=maps)
            shut = Threshold(Site(1), direction(70), 1e9, each_token=True)
            start(worker, "a", steering((1, Add(direction(1)), RULES[0])).when(shut), 3)
            start(worker, "b", steering((1, read_write(2, 8, scale=1e30), RULES[0])), 3)
            graph = Graph(worker, 6, pair=False)
            worker.begin(Chunks(["a", "b", "c"], [0, 0, 0], [2, 2, 1]))
            x = torch.randn(LAYERS, 6, WIDTH, dtype=torch.float64)
            x[1, 0, 0], x[1, 1, :2] = -0.0, torch.tensor([torch.inf, -torch.inf])
            x[1, 2], x[1, 4, 3], x[1, 5] = torch.nan, torch.nan, -0.0
            result = graph.replay(x, None)
            same = result.view(torch.int64) == x.view(torch.int64)
            assert bool(same[:, [0, 1, 4, 5]].all())
            assert bool(result[1, 3].isfinite().all())
            assert not torch.equal(result[1, 3], x[1, 3])

    def test_another_mix_leaves_a_token_as_it_is(self) -> None:
        worker = static_rig()
        mine = steering((1, SetProjection(direction(2), 1.5), RULES[0]), (2, Add(direction(3)), RULES[0]))
        start(worker, "a", mine, 3)
        graph = Graph(worker, 4)
        x, residual = torch.randn(2, LAYERS, 4, WIDTH, dtype=torch.float64)
        worker.begin(Chunks(["a"], [0], [1]))
        alone = graph.replay(x, residual)
        for i, other in enumerate(mixes(5, 3)):
            start(worker, str(i), other, 3)
        worker.begin(Chunks(["a", "0", "1", "2"], [1, 0, 0, 0], [1, 1, 1, 1]))
        assert torch.equal(graph.replay(x, residual)[:, 0], alone[:, 0])


class TestReading:
    def test_what_is_read_is_kept_by_the_graph(self) -> None:
        """Over chunks of a prompt, behind the edits, at the positions that were asked for."""
        fixed, plain = static_rig(), in_python()
        wire, content = placed(steering((1, Ablate(direction(1)), RULES[0])), 6)
        graph, seed = Graph(fixed, 5), torch.Generator().manual_seed(0)
        for worker in (fixed, plain):
            worker.steerings[wire.parts[0].digest] = content
            worker.start("a", Wire(wire.parts, Reading("r", (Site(1), Site(2)), (1, 4)), 6, wire.spans))
        for first in (0, 3):
            hidden, residual = torch.randn(2, LAYERS, 5, WIDTH, generator=seed, dtype=torch.float64)
            for worker in (fixed, plain):
                worker.begin(Chunks(["b", "a"], [0, first], [1, 3]))
            graph.replay(hidden, residual)
            wanted = hidden.clone()
            for layer in range(LAYERS):
                plain.apply(Site(layer), wanted[layer], residual[layer])
            for worker in (fixed, plain):
                receipt = worker.end()
                assert receipt is not None
                assert receipt.resolve_faults() == {}
        readings, theirs = fixed.pop_reading("r"), plain.pop_reading("r")
        for layer in (1, 2):
            torch.testing.assert_close(readings[Site(layer)], theirs[Site(layer)], rtol=1e-9, atol=1e-9)
        assert readings[Site(1)].shape == (2, WIDTH)

    def test_graphs_that_keep_nothing_are_not_read(self) -> None:
        worker = static_rig(KERNELS["projections"])
        with pytest.raises(TrimtabError, match="captured graphs don't keep"):
            worker.start("a", Wire((), Reading("r", (Site(1),), (0,)), 2))


class TestLongPasses:
    """A pass of more tokens than are captured runs in Python, with whatever is there, and is counted so."""

    def test_it_is_steered_and_counted_in_python(self) -> None:
        worker, plain = static_rig(captured=4), in_python()
        acting = steering((1, Ablate(direction(1)), RULES[0]), (2, Add(direction(2)), RULES[0]))
        for each in (worker, plain):
            start(each, "a", acting, 9)
        graph = Graph(worker, 4)
        for first, count in ((0, 9), (9, 1), (10, 1)):
            x, residual = torch.randn(2, LAYERS, max(count, 4), WIDTH, dtype=torch.float64)
            for each in (worker, plain):
                each.expect({"a": count})
                each.begin(Chunks(["a"], [first], [count]))
            result, wanted = x.clone(), x.clone()
            for layer in range(LAYERS):
                plain.apply(Site(layer), wanted[layer], residual[layer])
                if count > 4:
                    worker.apply(Site(layer), result[layer], residual[layer])
            if count <= 4:
                result = graph.replay(x, residual)
            for each in (worker, plain):
                receipt = each.end()
                assert receipt is not None
                assert receipt.resolve_faults() == {}
            torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-9)
            assert not torch.equal(result, x)

    def test_a_replay_in_its_place_is_noticed(self) -> None:
        worker = static_rig(captured=4)
        start(worker, "a", steering((1, Add(direction(1)), RULES[0])), 9)
        graph = Graph(worker, 4)
        worker.expect({"a": 9})
        worker.begin(Chunks(["a"], [0], [9]))
        graph.graph.replay()
        receipt = worker.end()
        assert receipt is not None
        assert "behind block 1" in receipt.resolve_faults()["a"]


class TestCapacity:
    @pytest.mark.parametrize(
        ("edit", "capacity", "why"),
        [
            (Edit(Site(1), Ablate(direction(1))), Capacity(), "more than additions after blocks"),
            (Edit(Site(1), Ablate(direction(1))), Capacity(rank=1, layers=(2,)), "more than additions at layer 1"),
            (Edit(Site(1), read_write(1, 5)), KERNELS["projections"], "rank 5, more than 4"),
            (Edit(Site(1), ScaleElements(direction(1))), KERNELS["projections"], "scaled elements"),
            (Edit(Site(1), Add(direction(1), keep_norm=True)), KERNELS["projections"], "norms"),
            (Edit(Site(1), Ablate(direction(1)), gate=GATES[0]), KERNELS["projections"], "conditions on each token"),
            (Edit(Site(1), Add(direction(1)), gate=Threshold(Site(0), direction(1), 0.0)), Capacity(), "keep no act"),
            (Edit(Site(1), Rotate(direction(1), angle=0.3)), ALL, "support only add"),
            (
                Edit(Site(1), RotatePredicted(direction(1), torch.zeros(weight_count(WIDTH)))),
                ALL,
                "support only add",
            ),
            (Edit(Site(1), Ablate(direction(1)), gate=GATES[0] & GATES[1]), ALL, "is one threshold"),
            (
                Edit(
                    Site(1), Ablate(direction(1)), gate=Threshold(Site(1), direction(1), 0.0, "cast", each_token=True)
                ),
                ALL,
                "is one threshold",
            ),
        ],
    )
    def test_what_there_is_no_room_for_is_said_before_it_runs(self, edit: Edit, capacity: Capacity, why: str) -> None:
        with pytest.raises(UnsupportedError, match=why):
            check_supported(Steering((edit,)), layers=LAYERS, widths={"residual": WIDTH}, capacity=capacity)
        check_supported(
            Steering((replace(edit, strength=0.0),)), layers=LAYERS, widths={"residual": WIDTH}, capacity=capacity
        )
        check_supported(Steering((edit,)), layers=LAYERS, widths={"residual": WIDTH})

    def test_edits_that_act_together_are_looked_at_together(self) -> None:
        acting = steering((1, read_write(1, 3, low=0.0), RULES[0]), (1, read_write(2, 3), RULES[0]))
        state = State("two", acting.edits)
        with pytest.raises(UnsupportedError, match="2 steps that don't fold, more than 1"):
            check_fits(state, replace(KERNELS["all"], rank=8))
        check_fits(state, capacity_for(acting))
        with pytest.raises(UnsupportedError, match="2 steps"):
            start(static_rig(KERNELS["all"]), "a", acting, 3)

    @pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: type(o).__name__)
    def test_what_a_steering_needs_is_enough_for_it(self, operation: Any) -> None:
        acting = steering((1, operation, RULES[0]), (3, Add(direction(1)), RULES[0]))
        capacity = capacity_for(acting)
        check_supported(acting, layers=LAYERS, widths={"residual": WIDTH}, capacity=capacity)
        plain = isinstance(operation, Add) and not operation.keep_norm
        assert capacity == Capacity() if plain else capacity.layers == (1,)
        assert Capacity.from_plain(capacity.to_plain()) == capacity
        assert capacity | Capacity() == capacity == capacity | capacity

    def test_the_environment_says_how_much(self) -> None:
        assert capacity_from({}) is None
        assert capacity_from({"TRIMTAB_KERNEL": "projections"}) == Capacity(rank=4)
        capacity = capacity_from({"TRIMTAB_RANK": "64", "TRIMTAB_LAYERS": "1-2,5", "TRIMTAB_STEPS": "2"})
        assert capacity == replace(KERNELS["all"], rank=64, steps=2, layers=(1, 2, 5))
        for name, value in (("KERNEL", "some"), ("RANK", "0"), ("STEPS", "x"), ("LAYERS", "3-1"), ("LAYERS", "a")):
            with pytest.raises(TrimtabError, match=f"TRIMTAB_{name}"):
                capacity_from({f"TRIMTAB_{name}": value})


class Launches(TorchDispatchMode):
    """Counts what would be a kernel on a GPU: operators that aren't views and don't merely allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        if not any(r.alias_info and not r.alias_info.is_write for r in returns) and "empty" not in str(func):
            self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("capacity", "most"),
    [
        (Capacity(), 3),
        (KERNELS["projections"], 13),
        (replace(KERNELS["projections"], scales=True), 14),
        (KERNELS["all"], 30),
    ],
    ids=["additions", "projections", "and scales", "all"],
)
def test_launches_behind_a_block(capacity: Capacity, most: int) -> None:
    worker = static_rig(capacity, dtype=torch.bfloat16, maps=200)
    hidden, residual = torch.zeros(2, 8, WIDTH, dtype=torch.bfloat16)
    with Launches() as counted:
        worker.apply(Site(1), hidden, residual)
    assert counted.counts.total() <= most, counted.counts


def test_copies_to_a_gpu_and_waits_for_it() -> None:
    """Steady decoding copies nothing; another batch copies an index or two, a new state what it adds or its maps."""
    with pretending() as counts:
        worker = static_rig(KERNELS["projections"], dtype=torch.float32, device=GPUS[0])
        added = steering(*((layer, Add(direction(layer)), RULES[0]) for layer in range(LAYERS)))
        counts.clear()
        start(worker, "a", added, 4)
        assert counts.totals[1:] == (0, 1)  # waits, and copies: the vectors of all layers at once
        counts.clear()
        start(worker, "b", steering((1, Ablate(direction(5)), RULES[0])), 4)
        assert counts.totals[1:] == (0, 2)  # a map, and the numbers of all layers
        for first, copies in ((4, 2), (5, 0), (6, 0)):
            counts.clear()
            worker.begin(Chunks(["a", "b", "c"], [first] * 3, [1] * 3))
            x = on_gpu(torch.zeros(8, WIDTH))
            for layer in range(LAYERS):
                worker.apply(Site(layer), x, None)
            assert counts.totals[1:] == (0, copies)
        worker.finish(["b"])
        counts.clear()
        worker.begin(Chunks(["a", "c"], [7, 7], [1, 1]))
        assert counts.totals[1:] == (0, 2)  # what stood in the maps' index is taken away
        worker.finish(["a"])
        counts.clear()
        worker.begin(Chunks(["c"], [8], [1]))
        assert counts.totals[1:] == (0, 1)


def test_alike_blocks_are_compiled_once() -> None:
    """Which block it stands behind is an input of the operator's, not a constant of the graph."""
    worker = static_rig()
    blocks = {Site(layer): Place(Block(), WIDTH) for layer in range(3)}
    from trimtab.engines.vllm import operator

    operator.MANAGERS.append(worker)
    try:
        attach(blocks, len(operator.MANAGERS) - 1)
        seen: list[str] = []

        def backend(graph: torch.fx.GraphModule, _inputs: Sequence[Any]) -> Any:
            seen.append(graph.print_readable(print_output=False, include_stride=True))
            return graph

        for block in blocks.values():
            torch._dynamo.reset()
            hidden, residual = torch.zeros(2, 3, WIDTH, dtype=torch.float64)
            torch.compile(torch.nn.Sequential(block.module), backend=backend, fullgraph=True)((hidden, residual))
        assert len(seen) == 3
        assert "trimtab.steer" in seen[0]
        assert len({text.replace("\n", "") for text in seen}) == 1
        assert sorted(worker._seen) == [Site(layer) for layer in range(3)]
    finally:
        operator.MANAGERS.remove(worker)


class Block(torch.nn.Module):
    def forward(self, both: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return both[0] + 1, both[1]
