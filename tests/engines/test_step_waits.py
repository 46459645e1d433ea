"""A step of a batch makes the host wait once for the device, for however many rows, counted on a pretend GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import naive_meanings
import pytest
import tiny
from pretend_gpu import Counts, move, pretending
from test_decode import STEERINGS, request_of
from tiny import direction, prompt

from trimtab import Add, Edit, Monitor, Positions, Site, Steering, Threshold
from trimtab.engines.transformers.batch_row import GenerationRequest
from trimtab.engines.transformers.clean import CleanBatch
from trimtab.engines.transformers.decode import GenerationBatch
from trimtab.engines.transformers.sampling import GREEDY, Sampling
from trimtab.lm import LM

WAYS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}],
    "greedy, log-probabilities": [{"alternatives": 3}],
    "sampled": [{"sampling": Sampling(1.0, seed=1)}],
    "top_p and log-probabilities": [{"sampling": Sampling(1.0, 0.9, seed=1), "alternatives": 0}],
    "mixed": [
        {"sampling": GREEDY, "alternatives": 5},
        {"sampling": Sampling(0.7, 0.8, seed=1, top_k=20)},
        {"sampling": Sampling(1.3, seed=2, min_p=0.1), "alternatives": 2},
        {"sampling": Sampling(repetition_penalty=1.4)},
    ],
}


@pytest.fixture(scope="module")
def device() -> Iterator[tuple[LM, Counts]]:
    lm = tiny.tiny("llama")
    move(lm.model)
    with pretending() as counts:
        yield lm, counts


@pytest.mark.long_unless(lambda rows: rows != 3)
@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("name", WAYS)
def test_one_wait_and_no_copies(device: tuple[LM, Counts], name: str, rows: int, steered: bool) -> None:
    lm, counts = device
    batch = GenerationBatch(lm.model, lm.tokenizer, lm.layout)
    for row in range(rows):
        way = WAYS[name][row % len(WAYS[name])]
        if steered:
            batch.insert(request_of(lm, row, 4 + row, 20, **way))
        else:
            batch.insert(GenerationRequest(tuple(lm.encode(prompt(row, 4 + row))), None, 20, **way))
    for _ in range(7):  # what stays the same is put on the device, and no row is steered in another way any more
        batch.step()
    for _ in range(3):
        counts.clear()
        assert len(batch.step()) == rows
        _, waits, copies = counts.totals
        assert (waits, copies) == (1, 0), (counts.waits, counts.copies)


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_monitors_and_clean_caches_wait_no_more(device: tuple[LM, Counts], rows: int, clean: bool) -> None:
    """Rows with a clean cache or without, monitored at two layers: one wait a step."""
    lm, counts = device
    batch = CleanBatch(lm.model, lm.tokenizer, lm.layout)
    monitors = tuple(Monitor(f"m{i}", Threshold(Site(i), direction(i), 0.0), 1e9) for i in (1, 2))
    add = Steering((Edit(Site(1), Add(direction(3)), Positions.all()),))
    for row in range(rows):
        ids = tuple(lm.encode(prompt(row, 4 + row)))
        batch.insert(GenerationRequest(ids, add, 30, monitors=monitors[: row % 3 + 1], clean_cache=clean))
    for _ in range(7):
        batch.step()
    for _ in range(3):
        counts.clear()
        assert len(batch.step()) == rows
        _, waits, copies = counts.totals
        assert (waits, copies) == (1, 0), (counts.waits, counts.copies)


@pytest.mark.parametrize("turns", [False, True])
def test_positions_by_meaning_wait_no_more(device: tuple[LM, Counts], turns: bool) -> None:
    """Rows whose texts are followed; whether what acts on them changes all the time, or never."""
    lm, counts = device
    batch = GenerationBatch(lm.model, naive_meanings.tokenizer(), lm.layout)
    rule = ~Positions.at("a") if turns else Positions.after("no such text") | Positions.generated()
    for row in range(4):
        steering = Steering((Edit(Site(1), Add(tiny.direction(row)), rule), Edit(Site(2), Add(tiny.direction(5)))))
        batch.insert(GenerationRequest(tuple(lm.encode(prompt(row, 4 + row))), steering, 40))
    for _ in range(7):
        batch.step()
    counts.clear()
    for _ in range(12):
        assert len(batch.step()) == 4
    _, waits, copies = counts.totals
    assert waits == 12, counts.waits
    assert (copies > 0) is turns, counts.copies


def test_the_numbers_ahead_are_copied_now_and_then(device: tuple[LM, Counts], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.engines.transformers.sampling.NUMBERS_ON_DEVICE", 4)
    lm, counts = device
    batch = GenerationBatch(lm.model, lm.tokenizer, lm.layout)
    for row in range(5):
        batch.insert(request_of(lm, row, 4 + row, 30, sampling=Sampling(1.0, 0.9, seed=row)))
    for _ in range(9):
        batch.step()
    counts.clear()
    for _ in range(8):
        batch.step()
    assert counts.totals[1] == 8
    assert counts.totals[2] == 2


def test_the_tokens_are_those_of_the_cpu(device: tuple[LM, Counts]) -> None:
    moved, _ = device
    plain = tiny.tiny("llama")
    runs = []
    for lm in (moved, plain):
        batch = GenerationBatch(lm.model, lm.tokenizer, lm.layout)
        for row in range(len(STEERINGS)):
            batch.insert(request_of(lm, row, 4 + row, 6, **WAYS["mixed"][row % 4]))
        events = []
        while len(batch):
            events += [(response.key, response.token) for response in batch.step()]
        runs.append(events)
    assert runs[0] == runs[1]
