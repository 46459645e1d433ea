"""The exact paired test, against all ways to flip signs; and how often a search is wrong that has nothing to find."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from trimtab.evaluate.decision import (
    LEVEL,
    Decision,
    decide,
    describe_decision,
    error_rate_text,
    min_items_for_verdict,
    sign_flip,
)
from trimtab.evaluate.intervals import Interval, mcnemar
from trimtab.steering import Add, Edit, Site, Steering
from trimtab.tune.candidates import grid
from trimtab.tune.meter import Outcome
from trimtab.tune.tune import search


def naive(differences):
    seen = sum(differences)
    flips = list(itertools.product((-1, 1), repeat=len(differences)))
    return sum(sum(s * d for s, d in zip(f, differences, strict=True)) >= seen - 1e-12 for f in flips) / len(flips)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_share_of_all_flips(seed):
    draw = random.Random(seed)
    whole = [draw.choice([-1, 0, 0, 1]) for _ in range(10)]
    real = [draw.gauss(0.2, 1) for _ in range(9)]
    assert sign_flip(whole) == pytest.approx(naive(whole))
    assert sign_flip(real) == pytest.approx(naive(real))


def test_counting_and_drawing_agree_with_trying_all(monkeypatch):
    draw = random.Random(3)
    whole = [draw.choice([-2, -1, 1, 2, 2]) for _ in range(14)]
    real = [draw.gauss(0.3, 1) for _ in range(14)]
    exact = sign_flip(whole), sign_flip(real)
    monkeypatch.setattr("trimtab.evaluate.decision.ENUMERATED", 0)
    assert sign_flip(whole) == pytest.approx(exact[0])
    assert sign_flip(real) == pytest.approx(exact[1], abs=0.02)


@pytest.mark.parametrize(("won", "lost"), [(5, 0), (7, 1), (9, 4), (40, 20)])
def test_passes_and_failures_are_mcnemars_test_on_one_side(won, lost):
    before, after = [0] * won + [1] * lost + [1, 0], [1] * won + [0] * lost + [1, 0]
    decision = decide(before, after)
    assert decision.p == pytest.approx(mcnemar(before, after) / 2)
    assert (decision.won, decision.lost, decision.items) == (won, lost, won + lost + 2)


def test_one_lucky_prompt_is_no_gain():
    assert decide([0] * 10, [1] + [0] * 9).verdict == "can't be told from luck"
    assert decide([0] * 10, [1] * 5 + [0] * 5).verdict == "better"
    assert decide([1] * 10, [0] * 5 + [1] * 5).verdict == "worse"
    assert min_items_for_verdict() == 5
    assert min_items_for_verdict(candidates=8) == 8
    assert decide([0] * 8, [1] * 8, candidates=8).verdict == "better"
    assert decide([0] * 7, [1] * 7, candidates=8).verdict == "can't be told from luck"
    assert decide([0] * 4, [1] * 4).verdict == "can't be told from luck"


def test_the_best_of_many_is_corrected():
    assert decide([0] * 10, [1] * 6 + [0] * 4, candidates=3).better
    assert not decide([0] * 10, [1] * 6 + [0] * 4, candidates=4).better


def test_what_belongs_together_changes_sign_together():
    decision = decide([0] * 12, [1] * 12, groups=[i // 3 for i in range(12)])
    assert (decision.items, decision.p) == (4, 1 / 16)


def test_of_all_outcomes_without_an_effect_so_few_are_called_better():
    """Exactly, over all outcomes of 12 passes and failures that are as likely one way as the other."""
    for changed in range(13):
        wrong = sum(
            sign_flip([1 if bit else -1 for bit in bits]) <= LEVEL for bits in itertools.product((0, 1), repeat=changed)
        )
        assert wrong / 2**changed <= LEVEL


@pytest.mark.parametrize("held_out", [0.4, 0.0])
def test_a_search_with_nothing_to_find_seldom_finds_something(held_out):
    """Steerings that do nothing, 8 of them, on 24 prompts: the share of searches that say "steer" is as stated."""
    add = Steering((Edit(Site(1), Add(torch.ones(4))),))
    candidates = grid({"add": add}, [0.1 * n for n in range(1, 9)])
    rounds, wrong = 300, 0
    for seed in range(rounds):
        draw = random.Random(seed)

        def trial(steerings, _items, _progress, draw=draw):
            return [Outcome(float(draw.random() < 0.5), 0.1, 1) for _ in steerings]

        outcome = search(candidates, list(range(24)), trial, guard=None, held_out=held_out, margin=0.0, seed=seed)
        wrong += outcome.steering is not None
    assert wrong / rounds <= LEVEL


def test_the_words_say_what_was_seen_and_how_sure_it_is():
    decision = decide([0] * 8, [1] * 6 + [0] * 2, candidates=2)
    assert (
        describe_decision(decision)
        == "better: 0.75 instead of 0.00 on 8 prompts (6 better, 0 worse; p = 0.031 for the best of 2)"
    )
    assert "5%" in error_rate_text()
    worse = Decision(9, 0.9, 0.1, Interval(-0.8, -1, -0.5), 0, 7, 1.0, 0.0078)
    assert describe_decision(worse, "items").startswith(
        "worse: 0.10 instead of 0.90 on 9 items (0 better, 7 worse; p = 0.0078"
    )


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match="isn't a number"):
        decide([0.0, float("nan")], [1.0, 1.0])
