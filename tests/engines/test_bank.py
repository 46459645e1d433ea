"""The slots of a bank, as rows come, change and go: each as its own edits alone would have it, and what that costs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from pretend_gpu import GPUS, Counts, move, on_gpu, pretending
from tiny import LAYERS, WIDTH, direction, prompt
from torch import Tensor

from trimtab import Ablate, Add, Edit, Positions, SetProjection, Site, Steering, TrimtabError
from trimtab.engines.folding import apply
from trimtab.engines.transformers import bank as bank_of
from trimtab.engines.transformers import map_bank
from trimtab.engines.transformers.bank import Bank, compile_edits
from trimtab.engines.transformers.decode import GenerationBatch, GenerationRequest
from trimtab.engines.transformers.plan import compile_plan
from trimtab.lm import LM
from trimtab.steering import ReadWrite, Rotate, RotateInPlane, RotatePredicted, ScaleElements, ScaleScores, emphasis
from trimtab.steering.rotations import weight_count

CPU = torch.device("cpu")
U, V = direction(1), direction(2)


def numbers(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OPERATIONS: list[Any] = [
    Add(3 * U),
    Add(V, keep_norm=True),
    Add(V, keep_norm=0.5),
    SetProjection(U, 1.5),
    SetProjection(V, 0.5, one_sided=True),
    Ablate(direction(3)),
    Rotate(U),
    Rotate(V, 0.4),
    Rotate(U, one_sided=False),
    RotateInPlane(U, V, 0.3),
    RotateInPlane(U, V),
    RotatePredicted(U, numbers(weight_count(WIDTH)) * 0.3),
    ScaleElements(U),
    ReadWrite(numbers(2, WIDTH), numbers(2, WIDTH, seed=4)),
    ReadWrite(numbers(3, WIDTH, seed=5), numbers(3, WIDTH, seed=6), low=0.0),
]


def some_edits(chance: random.Random) -> tuple[Edit, ...]:
    count = chance.choice([0, 1, 1, 2, 4])
    return tuple(
        Edit(Site(chance.randrange(2)), chance.choice(OPERATIONS), Positions.all(), chance.choice([1.0, 0.5, -1.0]))
        for _ in range(count)
    )


def alone(edits: tuple[Edit, ...], site: Site, x: Tensor) -> Tensor:
    """What the plan of one request does to `[1, 1, width]`."""
    stages = compile_plan([edits], [3], x.dtype).stages.get(site, ())
    for stage in stages:
        rows = {name: bank[1] if isinstance(bank, Tensor) else bank for name, bank in stage.rows.items()}
        rows = {
            name: bank_row[None, None]
            if isinstance(bank_row, Tensor)
            else bank_row.pick(torch.ones(1, 1, dtype=torch.long))
            for name, bank_row in rows.items()
        }
        x = apply(stage, rows, None if stage.in_place else True, x)
    return x


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.filterwarnings("error")
def test_each_row_gets_what_it_gets_alone(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_bank, "FEW", (32, 1)[seed % 2])  # with 1, maps of several rows are applied separately
    chance = random.Random(seed)
    bank, rows = Bank(torch.float64, lambda _: CPU), list[tuple[Edit, ...]]()
    for _ in range(60):
        what = chance.random()
        if what < 0.5 or not rows:
            edits = some_edits(chance)
            try:
                bank.insert(edits)
            except TrimtabError:  # two ends for one direction
                continue
            rows.append(edits)
        elif what < 0.7:
            row, edits = chance.randrange(len(rows)), some_edits(chance)
            try:
                bank.change(row, edits)
            except TrimtabError:
                continue
            rows[row] = edits
        else:
            row = chance.randrange(len(rows))
            bank.remove(row)
            rows[row] = rows[-1]
            rows.pop()
        assert bank.rows == len(rows)
        for site in (Site(0), Site(1)):
            assert bank.touched(site) == [any(edit.site == site for edit in edits) for edits in rows]
            x = new = numbers(len(rows), 1, WIDTH, seed=chance.randrange(1000))
            if site not in bank.sites:
                assert not any(bank.touched(site))
                continue
            for stage, parameters, active in bank.prepared(site, x):
                new = apply(stage, parameters, active, new)
            for row, edits in enumerate(rows):
                wanted = alone(edits, site, x[row : row + 1])
                assert torch.allclose(new[row], wanted[0], rtol=1e-12, atol=1e-12)
                if not bank.touched(site)[row]:
                    assert torch.equal(new[row], x[row])
    for _ in rows:
        bank.remove(0)
    assert bank.sites == []


def test_no_number_leaks_from_a_slot_into_another() -> None:
    bank = Bank(torch.float64, lambda _: CPU)
    bad = Add(torch.full((WIDTH,), 1e300, dtype=torch.float64), keep_norm=True)
    for edits in ((Edit(Site(0), bad, Positions.all(), 1e8),), (), (Edit(Site(0), Add(U, keep_norm=True)),)):
        bank.insert(edits)
    x = numbers(3, 1, WIDTH)
    new = x
    for stage, rows, active in bank.prepared(Site(0), x):
        new = apply(stage, rows, active, new)
    assert torch.equal(new[1], x[1])
    assert bool(new[2].isfinite().all())
    bank.remove(0)
    assert [bank.touched(Site(0))] == [[True, False]]


def test_what_a_lane_adds_is_as_long_as_it_says() -> None:
    edits = (Edit(Site(0), Add(3 * U), Positions.all(), 0.5), Edit(Site(0), Add(V), Positions.all()))
    assert compile_edits(edits, torch.float32).added[Site(0)] == pytest.approx(float((1.5 * U + V).norm()))
    assert compile_edits((*edits, Edit(Site(0), Rotate(U), Positions.all())), torch.float32).added == {}


def test_edits_that_cannot_act_together_change_nothing() -> None:
    bank = Bank(torch.float32, lambda _: CPU)
    bank.insert((Edit(Site(0), Add(U), Positions.all()),))
    bad = tuple(Edit(Site(0), SetProjection(U, target), Positions.all()) for target in (1.0, 2.0))
    with pytest.raises(TrimtabError, match="different targets"):
        bank.insert(bad)
    assert (bank.rows, bank.touched(Site(0))) == (1, [True])


class TestOnADevice:
    @pytest.fixture(scope="class")
    def device(self) -> Iterator[tuple[LM, Counts]]:
        lm = tiny.tiny("llama")
        move(lm.model)
        with pretending() as counts:
            yield lm, counts

    @pytest.mark.parametrize("operation", [Add(U), Ablate(V), Rotate(U, 0.3)])
    def test_a_row_that_joins_is_written_alone(self, device: tuple[LM, Counts], operation: Any) -> None:
        """One copy of all of its parameters, then one write for each; none at all of what was here before."""
        _, counts = device
        bank = Bank(torch.float32, lambda _: GPUS[0])
        edits = [
            tuple(Edit(Site(layer), operation, Positions.all(), 1 + i / 10) for layer in range(LAYERS))
            for i in range(3)
        ]
        bank.insert(edits[0])
        bank.insert(edits[0])
        for i, copies in ((0, 0), (1, 1), (1, 0), (2, 1)):
            counts.clear()
            bank.insert(edits[i])
            names = sum(len(lane.banks) for here in bank.stage_banks.values() for lane in here.values())
            lanes = 0 if isinstance(operation, Add) else LAYERS  # whose activity is a bank of its own
            ours = {line: n for line, n in counts.launches.items() if line.startswith("bank.py")}
            assert sum(ours.values()) <= names + lanes + copies
            assert counts.totals[1:] == (0, copies)
        counts.clear()
        bank.remove(1)
        assert counts.totals[0] <= names + lanes
        assert counts.totals[1:] == (0, 0)

    def test_a_row_with_a_low_rank_map_writes_that_map_alone(self, device: tuple[LM, Counts]) -> None:
        """A map is copied to the device once, with all else of its row, and into its place in the stack; where the
        rows of each map are, once for all layers.
        """
        _, counts = device
        bank = Bank(torch.float32, lambda _: GPUS[0])
        maps = [ReadWrite(numbers(2, WIDTH, seed=2 * i), numbers(2, WIDTH, seed=2 * i + 1), low=0.0) for i in range(5)]
        edits = [tuple(Edit(Site(layer), each, Positions.all()) for layer in range(LAYERS)) for each in maps]
        x = on_gpu(torch.ones(1, 1, WIDTH))

        def launches() -> int:
            for layer in range(LAYERS):
                bank.prepared(Site(layer), x)
            return counts.totals[0]

        counts.clear()
        bank.insert(edits[0])
        bank.insert(edits[0])
        launches()
        assert counts.totals[1:] == (0, 1)  # all rows have one map: nothing to index
        bank.insert(edits[1])
        bank.insert(edits[2])
        parameters = 1 + len(maps[0].map.tensors)  # the strength, and the matrices of the map
        for i, copies in ((3, 2), (3, 1), (0, 1)):
            counts.clear()
            bank.insert(edits[i])
            assert launches() <= LAYERS * (parameters + 1) + copies
            assert counts.totals[1:] == (0, copies)
        counts.clear()
        bank.remove(2)  # the only row of its map, whose place in the stack another one takes
        assert launches() <= LAYERS * (parameters + 1) + 1
        assert counts.totals[1:] == (0, 1)

    def test_steps_copy_nothing_whatever_the_mix(self, device: tuple[LM, Counts]) -> None:
        lm, counts = device
        mix = [operation for operation in OPERATIONS if not isinstance(operation, ScaleElements)]
        batch = GenerationBatch(lm.model, lm.tokenizer, lm.layout)
        for n, operation in enumerate(mix):
            edits = tuple(Edit(Site(layer), operation, Positions.all()) for layer in range(LAYERS))
            batch.insert(GenerationRequest(tuple(lm.encode(prompt(n, 4 + n % 3))), Steering(edits), 40))
        towards = emphasis(ScaleScores(2.0), [(1, 3)], range(LAYERS))
        keys = [batch.insert(GenerationRequest(tuple(lm.encode(prompt(n, 6))), towards, 40)) for n in range(2)]
        for key in (None, keys[0]):
            if key is not None:
                batch.remove(key)
            batch.step()
            batch.step()
            for _ in range(10):
                counts.clear()
                batch.step()
                assert counts.totals[1:] == (1, 0), (counts.waits, counts.copies)

    def test_a_site_that_is_elsewhere_than_was_thought_is_followed(self) -> None:
        bank = Bank(torch.float32, lambda _: CPU)
        bank.insert((Edit(Site(0), Ablate(U), Positions.all()),))
        with pretending() as counts:
            x = on_gpu(torch.ones(1, 1, WIDTH))
            (prepared,) = bank.prepared(Site(0), x)
            assert {value.device for value in prepared[1].values()} == {GPUS[0]}
            counts.clear()
            bank.insert((Edit(Site(0), Ablate(V), Positions.all()),))
            bank.prepared(Site(0), x)
            assert counts.totals[1:] == (0, 1)

    def test_edits_of_before_are_on_the_device_of_now(self) -> None:
        """The same edits again, after their site turned out to be elsewhere: their parameters are kept nowhere."""
        mapped = (Edit(Site(0), ReadWrite(numbers(2, WIDTH), numbers(2, WIDTH, seed=4)), Positions.all()),)
        bank = Bank(torch.float32, lambda _: CPU)
        bank.insert(mapped)
        with pretending():
            x = on_gpu(torch.ones(1, 1, WIDTH))
            bank.prepared(Site(0), x)
            bank.remove(0)
            bank.insert(mapped)
            (prepared,) = bank.prepared(Site(0), x)
            stage, parameters, active = prepared
            assert apply(stage, parameters, active, x).device == GPUS[0]  # mixed devices are refused


def test_parameters_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_of, "KEPT", 3)
    bank = Bank(torch.float32, lambda _: CPU)
    for strength in range(1, 9):
        bank.insert((Edit(Site(0), Add(U), Positions.all(), float(strength)),))
    assert len(bank._kept) == 3
    assert bank.added(Site(0)) == pytest.approx([float(strength) for strength in range(1, 9)])
