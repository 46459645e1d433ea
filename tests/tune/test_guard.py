"""The quality guard on made-up answers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from trimtab.evaluate.fluency import Fluency
from trimtab.tune.guard import Guard, median_perplexity

GOOD = Fluency(perplexity=6.0, distinct=1.0, repeated=0.0, tokens=20, empty=False, cut=False)
PLAIN = [GOOD] * 8


def some(count, **change):
    return [replace(GOOD, **change)] * count + [GOOD] * (8 - count)


def test_unsteered_answers_break_nothing():
    assert Guard().broken(PLAIN, PLAIN) == ()
    bad = [replace(GOOD, perplexity=math.inf, repeated=1.0, empty=True, cut=True)] * 8
    assert Guard().broken(bad, bad) == ()  # as bad as before is not the steering's doing


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (some(8, perplexity=12.1), "perplexity too high: 12.1, unsteered 6"),
        (some(8, perplexity=math.nan), "perplexity too high: inf, unsteered 6"),
        (some(5, perplexity=math.inf), "perplexity too high: inf, unsteered 6"),
        (some(8, perplexity=1.5), "perplexity too low: 1.5, unsteered 6"),
        (some(2, repeated=0.5), "repeated four-grams: 12%, unsteered 0%"),
        (some(1, empty=True), "empty answers: 12%, unsteered 0%"),
        (some(5, cut=True), "answers cut off: 62%, unsteered 0%"),
    ],
)
def test_each_limit_says_which_it_is(answers, said):
    assert Guard().broken(answers, PLAIN) == (said,)
    off = Guard(perplexity=None, certainty=None, repeated=None, empty=None, cut=None)
    assert off.broken(answers, PLAIN) == ()


@pytest.mark.parametrize(
    "answers",
    [some(8, perplexity=11.9), some(3, perplexity=math.nan), some(8, perplexity=1.8), some(4, cut=True)],
)
def test_within_the_limits_nothing_is_said(answers):
    assert Guard().broken(answers, PLAIN) == ()


def test_several_limits_are_all_named():
    reasons = Guard().broken([replace(GOOD, perplexity=1.0, repeated=0.9, cut=True)] * 8, PLAIN)
    assert [reason.split(":")[0] for reason in reasons] == [
        "perplexity too low",
        "repeated four-grams",
        "answers cut off",
    ]


def test_empty_answers_have_no_perplexity():
    assert median_perplexity([replace(GOOD, perplexity=math.inf, empty=True), GOOD]) == 6.0
    assert median_perplexity([replace(GOOD, empty=True)]) is None
    assert Guard().broken([replace(GOOD, perplexity=math.inf, empty=True)] * 8, PLAIN) == (
        "empty answers: 100%, unsteered 0%",
    )


def test_senseless_limits_and_lists_are_refused():
    for change in ({"perplexity": 0.5}, {"repeated": -0.1}, {"cut": math.nan}, {"empty": math.inf}):
        with pytest.raises(ValueError, match=next(iter(change))):
            Guard(**change)
    for sides in (([GOOD], []), ([], [])):
        with pytest.raises(ValueError, match="compared"):
            Guard().broken(*sides)
