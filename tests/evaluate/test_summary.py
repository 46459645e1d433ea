"""Sums by hand, and the intervals of clusters."""

import math
from fractions import Fraction

import numpy as np
import pytest

from trimtab.errors import TrimtabError
from trimtab.evaluate.intervals import mcnemar, paired_bootstrap
from trimtab.evaluate.records import Record
from trimtab.evaluate.summary import summarize


def records(arm, values, groups=None, score="pass"):
    return [
        Record(arm, f"i{n}", "p", "a", 1, "stop", scores={score: v}, group=groups and groups[n])
        for n, v in enumerate(values)
    ]


BEFORE, AFTER = [0, 0, 0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 1, 1, 0]


def test_by_hand():
    plain, steered = summarize(records("s", AFTER)[::-1] + records("u", BEFORE), ["pass"], baseline="u")
    assert (plain.arm, plain.n, plain.mean.estimate, plain.difference) == ("u", 8, 3 / 8, None)
    assert (steered.arm, steered.n, steered.mean.estimate) == ("s", 8, 6 / 8)
    assert steered.difference.mean.estimate == pytest.approx(3 / 8)
    assert (steered.difference.better, steered.difference.worse) == (4, 1)
    assert steered.difference.p == float(Fraction(2 * (1 + 5), 32))  # two tails of five coins, at most one head
    assert steered.difference.mean == paired_bootstrap(BEFORE, AFTER)
    assert steered.mean == paired_bootstrap(AFTER)
    assert steered.to_json()["difference"]["mean"]["estimate"] == pytest.approx(3 / 8)


def test_parts_by_key():
    lines = summarize(
        records("u", BEFORE) + records("s", AFTER), ["pass"], baseline="u", key=lambda r: "ab"[int(r.item[1]) >= 3]
    )
    by_key = {(line.key, line.arm): line for line in lines}
    assert [line.key for line in lines] == ["a", "a", "b", "b"]
    assert (by_key["a", "s"].n, by_key["a", "s"].mean.estimate, by_key["a", "s"].difference.mean.estimate) == (3, 1, 1)
    assert (by_key["b", "u"].mean.estimate, by_key["b", "s"].mean.estimate) == (3 / 5, 3 / 5)
    assert (by_key["b", "s"].difference.better, by_key["b", "s"].difference.worse) == (1, 1)


def test_scores_that_are_no_proportions_have_no_p():
    values = [0.5, 1.0, 3.0]
    _, steered = summarize(records("u", values) + records("s", [2 * v for v in values]), ["pass"], baseline="u")
    assert steered.difference.p is None
    assert steered.difference.mean.estimate == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (3, 3, 1.0), (8, 1, 20 / 512)]
)
def test_mcnemar(better, worse, p):
    before = [0] * better + [1] * worse + [1, 0]
    after = [1] * better + [0] * worse + [1, 0]
    assert mcnemar(before, after) == pytest.approx(p)


def test_mcnemar_of_thousands_is_a_number():
    assert 0 < mcnemar([0] * 1600 + [1] * 1400, [1] * 1600 + [0] * 1400) < 0.001
    with pytest.raises(ValueError, match=r"1 \(pass\) or 0 \(fail\)"):
        mcnemar([0.5], [1])
    with pytest.raises(ValueError, match="pairs"):
        mcnemar([0], [1, 1])


def test_groups_of_one_are_no_groups():
    values = np.random.default_rng(0).random(30).tolist()
    assert paired_bootstrap(values, groups=range(30)) == paired_bootstrap(values)


def test_copies_in_a_group_make_nothing_surer():
    values = np.random.default_rng(1).random(40).tolist()
    alone = paired_bootstrap(values)
    copied = [v for v in values for _ in range(9)]
    grouped = paired_bootstrap(copied, groups=[n for n in range(40) for _ in range(9)])
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high))
    naive = paired_bootstrap(copied)
    assert naive.high - naive.low < 0.5 * (alone.high - alone.low)


def test_groups_of_different_size_cover_the_truth():
    rng, trials, hits = np.random.default_rng(2), 300, 0
    for _ in range(trials):
        values, groups = [], []
        for group in range(40):
            level, size = rng.normal(1.0, 1.0), int(rng.integers(1, 6))
            values += (level + rng.normal(0, 0.3, size)).tolist()
            groups += [group] * size
        interval = paired_bootstrap(values, groups=groups, resamples=800)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.90 <= hits / trials <= 0.98


def test_records_of_a_group_are_drawn_together():
    groups = [f"g{n // 4}" for n in range(8)]
    (line,) = summarize(records("u", BEFORE, groups), ["pass"])
    assert line.mean == paired_bootstrap(BEFORE, groups=groups)
    assert line.mean != paired_bootstrap(BEFORE)


def test_what_makes_no_sense_is_refused():
    both = records("u", BEFORE) + records("s", AFTER)
    for bad, options, words in (
        ([], {}, "no records"),
        (both, {"baseline": "x"}, "no arm 'x'"),
        (both[:-1], {"baseline": "u"}, "'i7' is in only one of the arms"),
        (both + both[:1], {}, "'i0' occurs twice in arm 'u'"),
        (both + records("t", BEFORE, score="other"), {}, "no score 'pass'"),
        (records("u", [math.nan]), {}, "isn't a number"),
    ):
        with pytest.raises(TrimtabError, match=words):
            summarize(bad, ["pass"], **options)
    with pytest.raises(ValueError, match="groups"):
        paired_bootstrap([1, 2], groups=[1])
