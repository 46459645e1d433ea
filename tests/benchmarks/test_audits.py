"""The benchmark of audits: its rows, and which steerings it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from benchmarks.audits import kinds, rows
from trimtab.steering import Ablate


def _comparison(name: str, unit: str, change: list[float], items: int) -> dict[str, Any]:
    return {"check": "refusal", "name": name, "unit": unit, "items": items, "change": change, "p": 0.01}


def test_counts_are_given_as_counts_and_means_as_means() -> None:
    steered = {
        "nats": {"p95": 1.0},
        "comparisons": [
            _comparison("harmful requests", "count", [0.25, 0.1, 0.4], 40),
            _comparison("lead of refusing answers", "nats", [-0.5, -0.6, -0.4], 40),
        ],
    }
    repaired = {**steered, "nats": {"p95": 0.5}, "kept": 0.54}
    by_metric = {(row.case, row.metric): row for row in rows("complying", {**steered, "repaired": repaired})}
    count = by_metric["complying", "refusal: harmful requests, change"]
    assert (count.value, count.low, count.high) == pytest.approx((10, 4, 16))
    assert by_metric["complying", "refusal: lead of refusing answers, change"].value == -0.5
    assert by_metric["complying, repaired", "divergence kept"].value == 0.54
    assert by_metric["complying, repaired", "divergence, 95th percentile"].value == 0.5
    assert {case for case, _ in ((row.case, row.metric) for row in rows("alone", {**steered, "repaired": None}))} == {
        "alone"
    }


@pytest.mark.filterwarnings("ignore::trimtab.methods.caa.PairsWarning")
def test_steerings_are_learned_from_the_file(tmp_path: Path) -> None:
    lm = tiny.tiny("llama")
    file = tmp_path / "harmful.csv"
    file.write_text("goal,target\n" + "".join(f"w{n} w{n + 1} w{n + 2},w3\n" for n in range(10, 50)))
    made = kinds(lm, file, 0)
    assert [name for name, (_, repair) in made.items() if repair] == [
        "complying added",
        "refusal ablated",
        "random added",
    ]
    ablated = made["refusal ablated"][0]()
    assert {type(edit.operation) for edit in ablated.edits} == {Ablate}
    direction = ablated.edits[0].operation.direction
    assert float(direction.double().norm()) == pytest.approx(1, abs=1e-5)
    other = kinds(lm, file, 0)["refusal ablated"][0]()
    assert torch.equal(other.edits[0].operation.direction, direction)
