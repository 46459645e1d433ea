"""What foretells whether a direction steers, and the fit that makes a chance of it."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from tiny import direction, prompt, tiny

from trimtab.data.read import read_json
from trimtab.errors import TrimtabError
from trimtab.evaluate.divergence import divergence, reference
from trimtab.methods.caa import learn_caa
from trimtab.text.pairs import Pair
from trimtab.tune.forecast import (
    FILE,
    NAMES,
    Case,
    Forecast,
    Predictors,
    auc_of,
    chance_of,
    cross_validated_chances,
    fit,
    forecast,
    held_out_statistics,
    predictors,
)


def naive(values):
    """Agreement, d' and AUC by plain loops: each half along the mean difference of the other."""
    rows = []
    for half in (0, 1):
        mine = [v for i, v in enumerate(values) if i // 2 % 2 == half]
        other = [v for i, v in enumerate(values) if i // 2 % 2 != half]
        along = np.mean([p - n for p, n in other], axis=0)
        along = along / np.linalg.norm(along)
        up, down = [float(p @ along) for p, _ in mine], [float(n @ along) for _, n in mine]
        gap = np.mean(up) - np.mean(down)
        spread = math.sqrt((np.var(up, ddof=1) + np.var(down, ddof=1)) / 2)
        above = np.mean([(a > b) + (a == b) / 2 for a in up for b in down])
        rows.append((np.mean([a > b for a, b in zip(up, down, strict=True)]), gap / spread, above))
    return np.mean(rows, axis=0)


@pytest.mark.parametrize("seed", range(4))
def test_held_out_numbers_are_those_of_plain_loops(seed):
    values = torch.randn(14, 2, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[:, 0] += direction(seed)[:6].double() * seed
    assert held_out_statistics(values) == pytest.approx(tuple(naive(values.numpy())))


def test_pairs_that_agree_and_pairs_that_do_not():
    noise = torch.randn(40, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    apart = noise.clone()
    apart[:, 0] += 5
    agree, separation, auc = held_out_statistics(apart)
    assert agree == 1
    assert separation > 3
    assert auc == 1
    agree, separation, auc = held_out_statistics(noise)
    assert agree < 0.8
    assert auc < 0.75
    with pytest.raises(TrimtabError, match="don't differ"):
        held_out_statistics(torch.ones(8, 2, 3, dtype=torch.float64))


def test_the_curve_is_that_of_the_divergence():
    lm = tiny("llama")
    pairs = [Pair(prompt(n, 5), prompt(50 + n, 5), prompt(90 + n, 4), "answers") for n in range(12)]
    steering = learn_caa(lm, pairs, [2])
    prompts = [prompt(200 + n, 5) for n in range(3)]
    base = reference(lm, prompts, tokens=16)
    predicted = predictors(lm, pairs, steering, prompts)
    assert predicted == predictors(lm, pairs, steering, prompts, base=base)
    factor = next(f for f in (2.0**n for n in range(-8, 9)) if divergence(lm, f * steering, base).p95 > 1)
    slope = math.log2(divergence(lm, factor * steering, base).p95 / divergence(lm, factor / 2 * steering, base).p95)
    assert predicted.bend == pytest.approx(slope, abs=1.0)
    assert math.isfinite(predicted.reach)
    with pytest.raises(TrimtabError, match="8 are needed"):
        predictors(lm, pairs[:7], steering, prompts)


# ---- the fit ---------------------------------------------------------------------------------------------------


def cases(count=40, seed=0, strength=3.0):
    draw = random.Random(seed)
    made = []
    for n in range(count):
        features = tuple(draw.gauss(0, 1) for _ in range(4))
        made.append(Case(f"task {n // 2}", features, draw.random() < 1 / (1 + math.exp(-strength * features[0]))))
    return made


def test_the_fit_is_where_the_penalised_likelihood_is_highest():
    some = cases()
    fitted = fit(some, penalty=1.0)

    def loss(weights, intercept):
        total = sum(w * w for w in weights) / 2
        for case in some:
            p = chance_of(case.features, {**fitted, "weights": weights, "intercept": intercept})
            total -= math.log(p if case.worked else 1 - p)
        return total

    best = loss(fitted["weights"], fitted["intercept"])
    for n in range(4):
        for step in (-0.05, 0.05):
            moved = list(fitted["weights"])
            moved[n] += step
            assert loss(moved, fitted["intercept"]) > best
    assert loss(fitted["weights"], fitted["intercept"] + 0.05) > best
    assert loss(fitted["weights"], fitted["intercept"] - 0.05) > best


def test_a_task_is_foretold_without_itself():
    some = cases()
    chances, worked = cross_validated_chances(some)
    flipped = [Case(c.task, c.features, not c.worked) if c.task == "task 0" else c for c in some]
    again, _ = cross_validated_chances(flipped)
    assert again[:2] == chances[:2]
    assert worked == [case.worked for case in some]
    assert fit(some)["auc"] > 0.7
    assert fit(cases(strength=0.0, seed=5))["auc"] < 0.7


def test_the_auc_counts_pairs():
    assert auc_of([0.9, 0.5, 0.5, 0.1], [True, True, False, False]) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert math.isnan(auc_of([0.1], [True]))


def test_one_outcome_is_not_enough_to_fit():
    with pytest.raises(TrimtabError, match="a fit needs both outcomes"):
        fit([Case("a", (0.0,) * 4, False)] * 3)


def test_the_words_hang_on_the_chance():
    some = Predictors(0.9, 1.0, 0.8, 0.5, 1.9)
    words = [Forecast(chance, some, 30, 12, 0.8).verdict for chance in (0.9, 0.5, 0.1)]
    assert words == ["works", "can't say", "unlikely"]
    said = str(Forecast(0.9, some, 30, 12, 0.8))
    assert said.startswith("forecast: works. 90% of held-out pairs")
    assert "(chance 90%, by a fit to 30 bench results, of which 12 worked; AUC 0.80 on held-out tasks)" in said


@pytest.mark.parametrize(("results", "worked", "auc"), [(30, 12, 0.69), (30, 4, 0.9), (30, 26, 0.9), (8, 4, 0.9)])
def test_of_a_fit_that_has_not_shown_its_worth_nothing_is_said(results, worked, auc):
    unproven = Forecast(0.99, Predictors(0.9, 1.0, 0.8, 0.5, 1.9), results, worked, auc)
    assert unproven.verdict == "can't say"
    assert str(unproven).startswith("90% of held-out pairs point along the direction")
    assert "no forecast, since the fit can't be trusted" in str(unproven)
    assert "99%" not in str(unproven)


def test_a_fit_of_ones_own_is_used():
    some = cases(80, strength=6.0)
    mine = forecast(Predictors(3.0, 0.0, 0.5, 0.0, 0.0), fit(some))
    assert mine.trusted
    assert mine.verdict == "works"


def test_the_fit_that_comes_along_gives_a_chance():
    stored = read_json(FILE)
    assert stored["names"] == list(NAMES)
    assert stored["results"] == sum(source["results"] for source in stored["made_from"])
    assert 0 < stored["worked"] < stored["results"]
    assert 0 <= forecast(Predictors(0.9, 1.0, 0.8, 0.5, 1.9)).chance <= 1
