"""The verdicts on a report's page: one sentence for each arm, corrected for how many there are."""

from __future__ import annotations

import math

import pytest

from trimtab.commands.eval_verdicts import describe_test, verdict_lines
from trimtab.evaluate.records import Record

ARMS = {
    "unsteered": {"kind": "baseline"},
    "s x1": {"kind": "steered"},
    "s x2": {"kind": "steered"},
    "s x1, random 1": {"kind": "random"},
    "s x2, random 1": {"kind": "random"},
}


def records(scores):
    return [
        Record(arm, str(n), "?", "", 1, "stop", scores={"q": value})
        for arm, values in scores.items()
        for n, value in enumerate(values)
    ]


def test_clear_and_unclear_verdicts():
    scores = {
        "unsteered": [0.5] * 12,
        "s x1": [0.8] * 11 + [0.4],
        "s x2": [0.6, 0.4] * 6,
        "s x1, random 1": [0.2] * 12,
        "s x2, random 1": [0.5] * 12,
    }
    lines = verdict_lines(records(scores), ARMS, "q", "p(matching)", items="questions")
    # of the 4096 ways to flip the signs only one other has as large a sum; two arms: twice that
    assert lines == [
        "s x1: higher: p(matching) 0.77 instead of 0.50 on 12 questions (11 higher, 1 lower; p < 0.001)",
        "s x2: can't be told from luck: p(matching) 0.50 instead of 0.50 on 12 questions (6 higher, 6 lower; p = 1)",
        "for comparison, 2 random directions by the same test: 0 higher, 1 lower, 1 can't be told from luck",
    ]
    assert "multiplied by the number of comparisons (2)" in describe_test(ARMS)


def test_the_correction_decides():
    scores = {"unsteered": [0.0] * 5, **{arm: [1.0] * 5 for arm in list(ARMS)[1:]}}
    alone = {arm: ARMS[arm] for arm in ("unsteered", "s x1")}
    (line,) = verdict_lines(records(scores), alone, "q", "passed")
    assert line == "s x1: higher: passed 1.00 instead of 0.00 on 5 items (5 higher, 0 lower; p = 0.031)"
    first, second, few, _random = verdict_lines(records(scores), ARMS, "q", "passed")
    assert "can't be told from luck" in first
    assert "can't be told from luck" in second
    assert "p = 0.062" in first
    assert few == "these are too few items for any other verdict: it takes at least 6"


@pytest.mark.parametrize(("harmful", "word"), [(True, "better"), (False, "worse")])
def test_more_refusals_are_better_only_for_harmful_requests(harmful, word):
    arms = {arm: ARMS[arm] for arm in ("unsteered", "s x1")}
    scores = {"unsteered": [0.0] * 8, "s x1": [1.0] * 7 + [0.0]}
    (line,) = verdict_lines(
        records(scores),
        arms,
        "q",
        "refused",
        items="requests",
        part_of=lambda _record: "set",
        higher_is_better={"set": harmful},
    )
    assert line.startswith(f"s x1, set: {word}: refused 0.88 instead of 0.00 on 8 requests")
    assert ("7 better, 0 worse" if harmful else "0 better, 7 worse") in line


def test_items_without_a_score_are_left_out():
    arms = {arm: ARMS[arm] for arm in ("unsteered", "s x1")}
    some = {"unsteered": [0.0, 0.0, math.nan, 0.0], "s x1": [1.0, math.nan, 1.0, 1.0]}
    assert "on 2 items (2 higher, 0 lower" in verdict_lines(records(some), arms, "q", "score")[0]
    none = {"unsteered": [0.0, math.nan], "s x1": [math.nan, 1.0]}
    assert verdict_lines(records(none), arms, "q", "score") == [
        "s x1: no verdict, as none of the items has a score in both arms"
    ]
    assert "nothing to compare" in verdict_lines(records(none), {"unsteered": ARMS["unsteered"]}, "q", "score")[0]
    assert "has no score" in verdict_lines([], {}, "q", "score")[0]
