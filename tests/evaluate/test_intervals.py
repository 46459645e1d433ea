from __future__ import annotations

import numpy as np
import pytest

from trimtab.evaluate import paired_bootstrap


def test_the_estimate_is_the_mean_difference():
    interval = paired_bootstrap([0, 0, 1, 1], [1, 1, 1, 0])
    assert interval.estimate == pytest.approx(0.25)
    assert interval.low <= interval.estimate <= interval.high


def test_a_mean_of_many_has_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    interval = paired_bootstrap(values.tolist())
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)


def test_a_proportion_has_the_binomial_quantiles():
    interval = paired_bootstrap([1] * 16 + [0] * 16)
    assert (interval.low, interval.high) == pytest.approx((10.5 / 32, 21.5 / 32), abs=0.5 / 32 + 1e-9)


def test_pairing_takes_out_what_makes_prompts_differ():
    hardness = np.random.default_rng(2).normal(0, 10, 50)
    interval = paired_bootstrap(hardness.tolist(), (hardness + 1).tolist())
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((1, 1, 1))


def test_it_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    trials, hits = 300, 0
    for _ in range(trials):
        before = rng.random(32) < 0.4
        after = np.where(before, rng.random(32) < 0.9, rng.random(32) < 0.5)
        interval = paired_bootstrap(before.tolist(), after.tolist(), resamples=1000)
        hits += interval.low <= 0.4 * 0.9 + 0.6 * 0.5 - 0.4 <= interval.high
    assert 0.90 <= hits / trials <= 0.98


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(5).random(20).tolist()
    assert paired_bootstrap(values, seed=7) == paired_bootstrap(values, seed=7)
    assert paired_bootstrap(values, seed=7) != paired_bootstrap(values, seed=8)


def test_swapping_before_and_after_mirrors_the_interval():
    before, after = [0, 0, 1, 0, 1, 0], [1, 1, 1, 0, 1, 1]
    there, back = paired_bootstrap(before, after), paired_bootstrap(after, before)
    assert there.estimate == -back.estimate
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_a_higher_level_is_wider():
    values = np.random.default_rng(4).random(30).tolist()
    narrow, wide = paired_bootstrap(values, level=0.8), paired_bootstrap(values, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("before", "after", "level"), [([], None, 0.95), ([], [], 0.95), ([1], [1, 0], 0.95), ([1], None, 95)]
)
def test_what_makes_no_sense_is_refused(before, after, level):
    with pytest.raises(ValueError, match=r"pairs|no items|level"):
        paired_bootstrap(before, after, level=level)
