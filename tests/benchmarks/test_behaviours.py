"""The evaluation benchmarks, on a tiny model and a folder of made-up questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lettered import letters_lm
from tiny import direction, prompt

from benchmarks import behaviours
from benchmarks import eval as benchmark
from benchmarks.behaviours import Curve, read, run, slope
from trimtab import LM, Add, Edit, Site, Steering
from trimtab.bench.behaviours import stem
from trimtab.evaluate.ab import read_ab
from trimtab.evaluate.intervals import Interval
from trimtab.files.steering_file import load_steering

pytestmark = pytest.mark.filterwarnings("ignore::trimtab.methods.caa.PairsWarning", "ignore::trimtab.lm.DoseWarning")


def rows(count: int, seed: int, length: int = 20) -> list[dict[str, str]]:
    """Questions of which every third matches (A)."""
    made = []
    for i in range(count):
        letters = ("(A)", "(B)") if i % 3 == 0 else ("(B)", "(A)")
        question = f"{prompt(seed + i, length)} Choices:\n (A) w3\n (B) w4"
        made.append(
            {"question": question, "answer_matching_behavior": letters[0], "answer_not_matching_behavior": letters[1]}
        )
    return made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "caa" / "refusal"
    folder.mkdir(parents=True)
    test = rows(6, 100)
    test.append({**test[0], "answer_matching_behavior": "(C)", "question": "w3 w5 (A) w7"})
    (folder / "test_dataset_ab.json").write_text(json.dumps(test))
    asked_again = {**test[1], "question": test[1]["question"].removesuffix("w4") + "w6"}
    (folder / "generate_dataset.json").write_text(json.dumps([*rows(30, 200), asked_again]))
    (tmp_path / "data" / "mmlu").mkdir()
    mmlu = [
        {
            "prompt": r["question"],
            "correct": r["answer_matching_behavior"],
            "incorrect": r["answer_not_matching_behavior"],
        }
        for r in rows(4, 300)
    ]
    (tmp_path / "data" / "mmlu" / "mmlu.json").write_text(json.dumps(mmlu))
    return tmp_path / "data"


def test_what_is_learned_from_is_balanced_and_apart_from_what_is_tested(data: Path) -> None:
    parts = read(data / "caa" / "refusal", None, 8, 6)
    assert (len(parts.learn), len(parts.held_out), len(parts.test)) == (8, 6, 6)
    assert (parts.shared, parts.excluded) == (1, 1)
    for part in (parts.learn, parts.held_out):
        assert sum(item.matching == "A" for item in part) * 2 == len(part)
    stems = [{stem(item.question) for item in part} for part in (parts.learn, parts.held_out, parts.test)]
    assert sum(map(len, stems)) == len(set.union(*stems)) == 20
    assert read(data / "caa" / "refusal", None, 8, 6) == parts
    assert len(read(data / "caa" / "refusal", 3, 8, 6).test) == 3
    assert stem("Why so?\n\nChoices:\n (A) x\n (B) y") == stem("Why so?\n (A) z") == "Why so?"


def at(value: float, width: float = 0.01) -> Interval:
    return Interval(value, value - width, value + width)


def curve(means: list[float], changes: tuple[float, float], random: tuple[float, float]) -> Curve:
    scores = dict(zip((-2.0, -1.0, 0.0, 1.0, 2.0), map(at, means), strict=True))
    change = {-2.0: at(changes[0]), 2.0: at(changes[1])}
    return Curve((3,), scores, {}, 0.1, {}, change, {s: (at(random[0]), at(random[1])) for s in (-2.0, 2.0)})


def test_verdicts() -> None:
    rising = [0.3, 0.4, 0.5, 0.6, 0.7]
    good = curve(rising, (-0.2, 0.2), (-0.03, 0.03))
    assert good.monotone
    assert good.beyond
    assert good.band(2.0) == pytest.approx((-0.04, 0.04))
    assert not curve([0.3, 0.4, 0.5, 0.5, 0.7], (-0.2, 0.2), (-0.03, 0.03)).monotone
    assert not curve(rising, (-0.2, 0.035), (-0.03, 0.03)).beyond  # above every mean, within their intervals
    assert not curve(rising, (-0.035, 0.2), (-0.03, 0.03)).beyond
    assert slope({-2.0: 0.1, -1.0: 0.2, 1.0: 0.4, 2.0: 0.5}) == pytest.approx(0.1)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_leaves_tables_and_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = letters_lm()
    monkeypatch.setattr(LM, "load", lambda *_, **__: lm)
    monkeypatch.setattr(behaviours, "OPEN_PROMPTS", (prompt(1, 5), prompt(2, 6)))
    monkeypatch.setattr(behaviours, "TOKENS", 4)
    folder, arguments = tmp_path / "run", (None, 8, 6, 2, 4)
    first = run(None, data, folder, *arguments)
    names = {path.name for path in folder.iterdir()}
    assert {"tables.md", "refusal-layers.png", "refusal-test.png", "refusal.safetensors", "mmlu.jsonl"} <= names
    results = {(result.metric): result for result in first.results if result.case.startswith("refusal, layer")}
    assert {f"p(matching) at {s}" for s in ("-2", "-1", "+0", "+1", "+2")} <= set(results)
    assert results["change at +2"].value == pytest.approx(
        results["p(matching) at +2"].value - results["p(matching) at +0"].value
    )
    tables = (folder / "tables.md").read_text()
    assert "matching refuses" in tables
    assert "| refusal | 8 | 6 | 6 | 1 | 1 |" in tables

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("this was done already")

    monkeypatch.setattr(lm, "next_logprobs", never)
    monkeypatch.setattr(lm, "generate", never)
    monkeypatch.setattr(behaviours, "learn_behaviours", never)
    assert run(None, data, folder, *arguments).results == first.results


def test_trained_vectors_and_both_orders(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over both orders of a question, the mean score of a model that only likes a letter is a half, steered or not."""
    lm = letters_lm()
    monkeypatch.setattr(LM, "load", lambda *_, **__: lm)
    monkeypatch.setattr(behaviours, "OPEN_PROMPTS", (prompt(1, 5),))
    monkeypatch.setattr(behaviours, "TOKENS", 2)
    monkeypatch.setattr(behaviours, "TRAINED_STEPS", 2)
    report = run(None, data, tmp_path / "run", None, 8, 6, 1, 4, learner="bipo", both_orders=True)
    results = {r.metric: r for r in report.results if r.case == "refusal, layers 0 to 3, 6 questions"}
    assert {"p(matching) at +2", "change at +2, random", "monotone"} <= set(results)
    assert load_steering(tmp_path / "run" / "refusal-bipo.safetensors").card.method == "bipo"
    parts = read(data / "caa" / "refusal", None, 8, 6).in_both_orders()
    assert (len(parts.test), parts.questions, len(parts.learn)) == (12, 6, 16)
    assert sum(item.matching == "A" for item in parts.test) == 6


def test_the_sweep_and_one_at_a_time_score_the_same(data: Path) -> None:
    lm = letters_lm()
    items, _ = read_ab(data / "caa" / "refusal" / "test_dataset_ab.json", exclude=True)
    vector = Steering(tuple(Edit(Site(layer), Add(direction(layer, 0.5))) for layer in (0, 2, 3)))
    slow, fast = benchmark.one_at_a_time(lm, vector, items), benchmark.sweep(lm, vector, items)
    assert set(slow) == set(fast)
    assert len(slow) == 3 * 5 * len(items)
    assert slow == pytest.approx(fast, abs=1e-6)
    assert len({round(score, 4) for score in slow.values()}) > 5 * len(items)  # the settings do differ
