"""The benchmarks' search for a setting: which of two searches counts, and who is asked when the best is refused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from tiny import prompt

from benchmarks import choosing
from benchmarks.choosing import HELD_OUT_QUERIES, RUNGS, SEARCH_QUERIES, Choice, Task, better, choose, steering_of
from trimtab.learn.moments import PairMoments
from trimtab.methods.instruct import learn_many
from trimtab.steering import Positions
from trimtab.text.pairs import Pair
from trimtab.tune.candidates import Setting
from trimtab.tune.tune import CandidateResult, HeldOut, Tuned

GRID = (("add", 1.0, None), ("add", 2.0, Positions.opening(3)))
COUNT = SEARCH_QUERIES + HELD_OUT_QUERIES


@pytest.fixture(scope="module")
def lm() -> Any:
    return tiny.tiny("llama")


@pytest.fixture(scope="module")
def moments(lm: Any) -> dict[int, PairMoments]:
    pairs = [Pair(prompt(seed, 9), prompt(50 + seed, 5), "", "prompts") for seed in range(6)]
    return learn_many(lm, {"one": pairs}, choosing.layers_of(lm))["one"]


@pytest.fixture(scope="module")
def task(moments: Any) -> Task:
    texts = [prompt(100 + i, 6) for i in range(COUNT)]
    return Task("a task", texts, texts, [moments] * COUNT, lambda i, answer, cut: i % 2 == 0)


def test_the_search_with_the_better_score_counts() -> None:
    settings = [Setting(3, 1.0, "all-but-first", "project"), Setting(2, 4.0, "opening:8", "add")]
    none = Choice(None, "none", 1, 1, 0.9)  # what it scored isn't what it steers
    lower, higher = (Choice(setting, "", 1, 1, score) for setting, score in zip(settings, (0.5, 0.75), strict=True))
    assert better([none, lower]) is lower
    assert better([lower, higher]) is higher
    assert better([higher, lower]) is higher
    assert better([lower, Choice(settings[1], "", 1, 1, 0.5)]) is lower
    assert better([none, Choice(None, "also none", 1, 1, 1.0)]) is none


def test_a_setting_keeps_its_positions(moments: Any) -> None:
    for where in ("opening:8", "from-last-prompt-token"):
        steering = steering_of(moments, Setting(min(moments), 4.0, where, "add"))
        assert {str(edit.positions) for edit in steering.edits} == {where}
        assert {edit.strength for edit in steering.edits} == {4.0}
    assert steering_of(moments, None) is None


def test_all_are_tried_and_no_gain_is_no_steering(lm: Any, task: Task) -> None:
    """Whoever answers, the same items hold: nothing is gained."""
    choice = choose(lm, task, GRID, 3)
    assert choice.setting is None
    assert choice.answers > len(choosing.layers_of(lm)) * len(GRID)


@pytest.mark.parametrize("finalists", [1, 3])
def test_the_next_best_gets_its_turn(lm: Any, task: Task, finalists: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def search(candidates: Any, names: Any, trial: Any, *, rungs: Any, **rest: Any) -> Tuned:
        calls.append(([candidate.setting for candidate in candidates], tuple(rungs)))
        first = len(calls) == 1
        rows = [CandidateResult(None, SEARCH_QUERIES, 0.2, 0.2, 0.0, 2.0, ())]
        scores = (0.9, 0.6, 0.2)[:finalists]
        rows += [
            CandidateResult(candidate.setting, SEARCH_QUERIES, score, 0.2, 0.1, 2.0, ())
            for candidate, score in zip(candidates, scores, strict=False)
        ]
        held = HeldOut(8, 0.7, 0.1, None, ("perplexity too high",) if first else ())
        setting = None if first else candidates[0].setting
        return Tuned(None, setting, "because", tuple(rows), held, None, False, False, 5, 50)

    monkeypatch.setattr(choosing, "search", search)
    choice = choose(lm, task, GRID, 3)
    everybody, rungs = calls[0]
    assert rungs == RUNGS
    if finalists == 1:  # nobody is left
        assert len(calls) == 1
        assert choice.setting is None
    else:  # the second of the three; the third is no better than not steering
        assert calls[1:] == [([everybody[1]], RUNGS[-1:])]
        assert choice.setting == everybody[1]
        assert choice.score == 0.7
