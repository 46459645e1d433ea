"""Choosing by nats instead of by a search: the strength, its cost, and the comparison of both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from tiny import prompt

from benchmarks import choosing
from benchmarks.choosing import SEARCH_QUERIES, Task, by_nats
from benchmarks.following import answers_file, compared, scores_by_kind, searches
from trimtab.bench.doses import TOKENS
from trimtab.evaluate.divergence import divergence, reference
from trimtab.methods.instruct import learn_many, steering_from
from trimtab.text.pairs import Pair


@pytest.fixture(scope="module")
def lm() -> Any:
    return tiny.tiny("llama")


@pytest.fixture(scope="module")
def task(lm: Any) -> Task:
    sets = {
        str(n): [Pair(prompt(seed, 9), prompt(50 + seed, 5), "", "prompts") for seed in range(6 * n, 6 * n + 6)]
        for n in range(2)
    }
    moments = learn_many(lm, sets, choosing.layers_of(lm))
    prompts = [prompt(200 + n, 5) for n in range(SEARCH_QUERIES + 2)]
    return Task("a task", prompts, prompts, [moments[str(n % 2)] for n in range(len(prompts))], lambda *_: True)


def test_the_strength_has_the_divergence_and_nothing_is_generated_under_it(lm: Any, task: Task) -> None:
    choice = by_nats(lm, task, 0.5)
    assert choice.setting is not None
    assert (choice.setting.operation, choice.setting.layer) == ("add", round(0.6 * lm.layout.layers))
    base = reference(lm, list(task.prompts[:SEARCH_QUERIES]), tokens=TOKENS)
    steerings = [
        choice.setting.strength * steering_from(moments, choice.setting.layer, operation="add")
        for moments in task.moments[:SEARCH_QUERIES]
    ]
    assert divergence(lm, steerings, base).p95 == pytest.approx(0.5, rel=0.11)
    assert choice.answers == SEARCH_QUERIES
    read, written = (sum(len(getattr(text, part)) for text in base.texts) for part in ("prompt", "answer"))
    assert (choice.tokens - read) % written == 0
    assert choice.tokens >= read + 2 * written


def test_a_divergence_that_no_strength_has_is_no_choice(lm: Any, task: Task) -> None:
    choice = by_nats(lm, task, 99.0)
    assert choice.setting is None
    assert "nats" in choice.reason


def test_types_near_the_best_are_counted_with_what_they_cost() -> None:
    scores = {"a": [1, 1, 0, 1], "b": [0.0] * 20, "c": [0.0] * 20, "d": [1.0, 1.0]}
    best = {"a": [1, 1, 1, 1], "b": [1.0] + [0.0] * 19, "c": [1.0, 1.0] + [0.0] * 18, "d": [0.0, 1.0]}
    results = compared("with", scores, best, dict.fromkeys("abcd", 10), {"a": 100, "b": 50, "c": 20, "d": 30})
    values = {(result.case, result.metric): result.value for result in results}
    assert len(values) == len(results) == 10
    for kind, gain, share in (("a", -0.25, 0.1), ("b", -0.05, 0.2), ("c", -0.1, 0.5), ("d", 0.5, 1 / 3)):
        case = f"with instruction: {kind}, by nats against tune's best"
        assert values[case, "accuracy, by nats minus tune's best"] == pytest.approx(gain)
        assert values[case, "tokens to choose, by nats / tune"] == pytest.approx(share)
    case = "with instruction, by nats against tune's best"
    assert values[case, "types at most 5 points below tune's best"] == 0.5  # b and d
    assert values[case, "tokens to choose, by nats / tune"] == pytest.approx(0.2)


def test_scores_are_those_of_the_steered_answers_of_a_type() -> None:
    items: Any = [SimpleNamespace(item=str(n), types=("a" if n % 2 else "b",)) for n in range(4)]
    records: Any = [
        SimpleNamespace(item=str(n), arm=arm, scores={"loose": float(n if arm == "steered" else 9)})
        for n in range(4)
        for arm in ("unsteered", "steered", "random")
    ]
    assert scores_by_kind(items, records, ["a", "b"]) == {"a": [1.0, 3.0], "b": [0.0, 2.0]}


def test_answers_by_nats_and_by_a_search_are_kept_apart(tmp_path: Any) -> None:
    names = {answers_file(tmp_path, "with", nats).name for nats in (None, 0.5, 1.0)}
    assert names == {"with-answers.jsonl", "with-0.5-nats-answers.jsonl", "with-1-nats-answers.jsonl"}
    assert [file.name for file in searches(tmp_path, "with", "a:b")] == ["with-a-b.json", "with-a-b-opening.json"]
