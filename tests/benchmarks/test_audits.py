"""The benchmark of audits: its rows, and which steerings it makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from benchmarks.audits import _stored, kinds, rows
from trimtab import Steering, TrimtabError
from trimtab.steering import Ablate


def _comparison(name: str, unit: str, before: float, after: float) -> dict[str, Any]:
    return {"name": name, "unit": unit, "items": 40, "before": before, "after": after, "p": 0.01}


def test_rows_are_the_unsteered_model_each_steering_and_its_repaired_form() -> None:
    steered = {
        "nats": {"p95": 1.0},
        "comparisons": [
            _comparison("harmful requests in jailbreak templates", "count", 11, 38),
            _comparison("lead of refusing answers", "nats", 1.5, 1.1),
        ],
    }
    repaired = {**steered, "nats": {"p95": 0.5}, "kept": 0.54}
    audits = {"complying": {**steered, "repaired": repaired}, "alone": {**steered, "repaired": None}}
    values = {(row.case, row.metric.partition(": ")[2]): row.value for row in rows(audits) if "Measured" in row.metric}
    assert values["unsteered", "complied, templates, of 40"] == 11
    assert values["complying", "complied, templates, of 40"] == 38
    assert values["complying, repaired", "divergence kept"] == 0.54
    assert values["complying, repaired", "divergence"] == 0.5
    assert values["alone", "lead of refusing answers, nats"] == 1.1
    assert {case for case, _ in values} == {"unsteered", "complying", "complying, repaired", "alone"}
    assert {row.value for row in rows(audits) if "P-value" in row.metric} == {0.01}


def test_audits_of_another_run_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    lm = tiny.tiny("llama")
    model = {"fingerprint": lm.identity.fingerprint, "dtype": lm.runs_in["dtype"]}
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"model": model, "size": "full", "seed": 0}))

    def make() -> Steering:
        raise AssertionError("it is in the folder")

    assert _stored(path, lm, make, False, quick=False, seed=0)["seed"] == 0
    for quick, seed in ((True, 0), (False, 1)):
        with pytest.raises(TrimtabError, match="an audit of another model, dtype, size or seed"):
            _stored(path, lm, make, False, quick=quick, seed=seed)
    path.write_text(json.dumps({"model": model | {"fingerprint": "other"}, "size": "full", "seed": 0}))
    with pytest.raises(TrimtabError, match="an audit of another model"):
        _stored(path, lm, make, False, quick=False, seed=0)


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
