"""The benchmark of all methods: what it measures, and against what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from tiny import prompt

from benchmarks import methods
from benchmarks.methods import GATES, OF_MIXTURES, SCORES, Case, cases_of, opened, run, speed
from trimtab import LM, Add, Edit, Site, Steering, Threshold, TrimtabError
from trimtab.files.steering_file import load_steering
from trimtab.methods.recipe import recipes

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, lm: LM) -> None:
    monkeypatch.setattr(LM, "load", lambda *_: lm)
    monkeypatch.setattr(methods, "PROMPTS", tuple(prompt(seed, 12 + seed % 3) for seed in range(4)))
    monkeypatch.setattr(methods, "ASKED", tuple(prompt(100 + seed, 4 + seed % 3) for seed in range(12)))
    monkeypatch.setattr(methods, "OTHERS", tuple(prompt(200 + seed, 4 + seed % 3) for seed in range(12)))
    monkeypatch.setattr(methods, "ENDS", (prompt(300, 5), prompt(301, 4)))


@pytest.mark.long
def test_every_method_is_measured_and_its_gates_are_open(lm: LM) -> None:
    cases = cases_of(lm)
    assert {case.method for case in cases} == {*recipes(), GATES, SCORES} - {*OF_MIXTURES}
    assert len({case.name for case in cases}) == len(cases)
    kinds = {case.name: case.kind for case in cases}
    assert kinds["caa"] == kinds["icv"] == "residual"
    assert kinds["iti"] == kinds["sadi"] == kinds["tda"] == "heads, neurons"
    assert kinds["cast"] == kinds["inferaligner"] == kinds["sttp"] == kinds["one addition, gate shut"] == "gate"
    assert kinds["cap"] == kinds["sttp, a mirror"] == "residual"
    assert kinds["PASTA"] == kinds["SpotLight"] == kinds["InstABoost"] == kinds["scaled keys"] == "scores"
    for case in cases:
        (answer,) = lm.generate(prompt(1, 12), case.steering, max_new_tokens=2)
        assert bool(answer.applied.edits) == ("shut" not in case.name), case.name


def test_an_opened_gate_reads_what_it_did() -> None:
    gates = [Threshold(Site(layer), tiny.direction(layer), 0.3, pool="unit-mean") for layer in (1, 2)]
    steering = Steering((Edit(Site(3), Add(tiny.direction(1)), gate=~gates[0]), Edit(Site(2), Add(tiny.direction(1)))))
    (first, second) = opened(steering).edits
    assert first.gate.readings == gates[0].readings
    assert first.gate.is_open({gates[0].reading: -1e9 * tiny.direction(1)})
    assert second == steering.edits[1]
    shut = opened(steering, to=False).edits[0].gate
    assert not shut.is_open({gates[0].reading: 1e9 * tiny.direction(1)})
    each = Threshold(Site(3), tiny.direction(1), 0.3, each_token=True)
    (edit,) = opened(Steering((Edit(Site(3), Add(tiny.direction(1)), gate=each),))).edits
    assert edit.gate.token_sites == each.token_sites


def test_each_is_compared_with_its_neighbour_in_time(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    cases = [Case("caa", f"case {n}", Steering()) for n in range(4)]
    monkeypatch.setattr(methods, "_generate", lambda *_: None)

    def timed(_lm: LM, batch: int, steering: Steering | None, tokens: int) -> object:
        """Unsteered runs take 2 and then 8 ms, steered ones 4."""
        batches.append(batch)
        number = 2.0 if not batches[1:] else 8.0
        return lambda: 4.0 if steering is not None else number

    monkeypatch.setattr(methods, "_timed", timed)
    results = {(r.case, r.metric): r for r in speed(lm, cases, 16, 2, 8)}
    ratio = "throughput / unsteered"
    values = [results[f"case {n} (residual), batch 16", ratio].value for n in range(4)]
    assert values == [0.5, 0.5, 0.5, 2.0]
    assert results["case 3 (residual), batch 16", ratio].holds
    assert not results["case 0 (residual), batch 16", ratio].holds
    assert set(batches) == {16}


def test_a_run_has_times_and_memories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Steering | None] = []

    def peak(*arguments: str) -> float:
        file = arguments[arguments.index("--file") + 1] if "--file" in arguments else None
        seen.append(None if file is None else load_steering(file))
        return 100.0 if file is None else 101.0

    monkeypatch.setattr(methods, "peak_of", peak)
    report = run([1, 2], 1, 3, ["caa", "actadd"], memory=True)
    assert {result.case for result in report.results} == {
        *(f"{name}, batch {batch}" for batch in (1, 2) for name in ("unsteered", "caa (residual)", "actadd (residual)"))
    }
    values = {(result.case, result.metric): result.value for result in report.results}
    assert values["caa (residual), batch 2", "peak memory / unsteered"] == pytest.approx(1.01)
    assert values["caa (residual), batch 2", "time a token"] > 0
    assert [steering is None for steering in seen] == [True, False, False] * 2
    json.dumps(report.to_json())
    with pytest.raises(TrimtabError, match="no method 'cba' to measure"):
        run([1], 1, 3, ["cba"], memory=False)
