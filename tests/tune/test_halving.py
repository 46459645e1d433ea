"""Successive halving on synthetic tables of scores: no model is near."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.tune.halving import Rung, Standing, count_answers, halve, ladder


def judged(steered, _unsteered):
    """Results are (score, dose, broken)."""
    return Standing(
        mean(r[0] for r in steered), mean(r[1] for r in steered), ("broken",) if any(r[2] for r in steered) else ()
    )


class Table:
    """Scores by candidate and item, and what has been asked of them."""

    def __init__(self, scores, doses=None, broken=()):
        self.scores, self.broken, self.scored = scores, set(broken), []
        self.doses = doses or [0.0] * len(scores)

    def __call__(self, candidates, items):
        self.scored += [(c, i) for c in candidates for i in items]
        return [[(self.scores[c][i], self.doses[c], c in self.broken) for i in items] for c in candidates]

    def run(self, rungs=None, **options):
        count, items = len(self.scores) - 1, len(self.scores[0])
        return halve(count, rungs or ladder(count, items), self, judged, **options)


tables = st.integers(1, 12).flatmap(
    lambda items: st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 1.0, math.nan]), min_size=items, max_size=items), min_size=2, max_size=9
    )
)


@settings(max_examples=200, deadline=None)
@given(tables, st.integers(1, 100), st.data())
def test_what_holds_of_every_search(scores, rows, data):
    broken = data.draw(st.sets(st.integers(1, len(scores) - 1)))
    table = Table(scores, broken=broken)
    result = table.run(rows=rows)
    items = len(scores[0])
    assert len(table.scored) == len(set(table.scored))  # nothing is asked twice
    assert len(table.scored) == count_answers(len(scores) - 1, ladder(len(scores) - 1, items))
    assert len(result.results[0]) == items  # "don't steer" is never eliminated
    for c, results in enumerate(result.results):  # items are nested
        assert sorted(i for who, i in table.scored if who == c) == list(range(len(results)))
    assert result.best not in broken
    if result.best:
        best = mean(scores[result.best])
        assert len(result.results[result.best]) == items
        assert math.isnan(mean(scores[0])) or best > mean(scores[0])
        for c, results in enumerate(result.results):
            if c and c not in broken and len(results) == items:
                assert math.isnan(mean(scores[c])) or best >= mean(scores[c])
    assert not result.interrupted
    assert not result.exhausted


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 8), st.floats(0.1, 0.9))
def test_ladders_grow_to_all_items(candidates, items, first, keep):
    rungs = ladder(candidates, items, first=first, keep=keep)
    assert rungs[-1].items == items
    assert all(a.items < b.items and a.survivors >= b.survivors >= 1 for a, b in pairwise(rungs))
    assert rungs[0].survivors <= candidates


def test_the_best_is_found_among_many():
    scores = [[0.2] * 16] + [[c / 40] * 16 for c in range(30)]
    table = Table(scores)
    assert table.run().best == 30
    assert len(table.scored) < 0.65 * 31 * 16


def test_all_zero_is_not_to_steer():
    assert Table([[0.0] * 8] * 5).run().best == 0


def test_a_tie_goes_to_not_steering_then_the_dose_then_the_layer():
    assert Table([[1.0] * 4, [1.0] * 4]).run().best == 0
    low, high = [0.0] * 4, [1.0] * 4
    assert Table([low, high, high, high], doses=[0, 0.3, 0.1, 0.2]).run().best == 2
    assert Table([low, high, high, high], doses=[0, 0.1, 0.1, 0.1]).run(ties=[0, 9, 5, 7]).best == 2
    assert Table([low, high, high, high]).run().best == 1


def test_no_number_is_never_chosen():
    nan = [math.nan] * 4
    assert Table([[0.0] * 4, nan, [0.5] * 4]).run().best == 2
    assert Table([[0.0] * 4, nan, [math.inf] * 4]).run().best == 0
    assert Table([nan, nan]).run().best == 0
    assert Table([nan, [0.5] * 4]).run().best == 1  # what can't be scored is worse than what can


def test_a_broken_guard_is_never_chosen_and_its_reason_is_kept():
    result = Table([[0.0] * 4, [1.0] * 4, [0.5] * 4], broken=[1]).run()
    assert result.best == 2
    assert result.standings[1].broken == ("broken",)
    assert Table([[0.0] * 4, [1.0] * 4], broken=[1]).run().best == 0


def test_a_guard_that_broke_by_bad_luck_can_mend():
    def forgiving(steered, _unsteered):
        return Standing(mean(steered), broken=("early",) if len(steered) < 4 and mean(steered) == 1 else ())

    rungs = [Rung(2, 2), Rung(4, 1)]
    result = halve(2, rungs, lambda cs, items: [[float(c == 1)] * len(items) for c in cs], forgiving)
    assert result.best == 1


def test_the_budget_ends_it_with_the_same_items_for_all():
    table = Table([[0.0] * 8, [1.0] * 8, [0.5] * 8])
    result = table.run(rungs=[Rung(8, 1)], rows=6, afford=lambda rows: len(table.scored) + rows <= 13)
    assert result.exhausted
    assert [len(results) for results in result.results] == [4, 4, 4]
    assert result.best == 1


def test_a_budget_for_part_of_a_step_is_used():
    table = Table([[0.0] * 8, [1.0] * 8])
    result = table.run(rungs=[Rung(8, 1)], rows=64, afford=lambda rows: len(table.scored) + rows <= 6)
    assert [len(results) for results in result.results] == [3, 3]


def test_a_budget_for_nothing_is_not_to_steer():
    result = Table([[0.0] * 8, [1.0] * 8]).run(afford=lambda _: False)
    assert (result.best, result.exhausted, result.standings) == (0, True, (None, None))


@pytest.mark.parametrize("after", range(4))
def test_an_interruption_keeps_the_best_so_far(after):
    table = Table([[0.0] * 8, [1.0] * 8])
    calls = []

    def evaluate(candidates, items):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(items)
        return table(candidates, items)

    result = halve(1, ladder(1, 8), evaluate, judged, rows=4)
    assert result.interrupted
    assert result.best == (1 if after else 0)
    assert {len(results) for results in result.results} == {2 * after}


def test_malformed_calls_are_refused():
    with pytest.raises(ValueError, match="more items"):
        halve(1, [Rung(4, 1), Rung(4, 1)], Table([[0.0] * 4] * 2), judged)
    with pytest.raises(ValueError, match="2 results were expected, got 1"):
        halve(1, [Rung(2, 1)], lambda cs, _: [[(0, 0, 0)] for _ in cs], judged)
    for call in (lambda: ladder(3, 0), lambda: ladder(3, 4, keep=1)):
        with pytest.raises(ValueError, match=r"items|share"):
            call()
