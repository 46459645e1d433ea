"""The benchmark of doses: what it sums up, on numbers that are known; and that it runs."""

from __future__ import annotations

import math
import warnings

import pytest
from tiny import direction, prompt, tiny

from benchmarks.doses import Arm, Cell, area, best, measure, middle, results_of
from trimtab.lm import DoseWarning
from trimtab.steering import Add, Edit, Positions, Site, Steering


def test_the_middle_of_the_layers():
    assert middle(1, 30) == [14]
    assert middle(6, 30) == [12, 13, 14, 15, 16, 17]
    assert middle(30, 12) == list(range(12))


def test_a_dose_that_tells_broken_from_whole():
    measured = [(0.1, False), (0.3, False), (0.5, True), (0.9, True)]
    assert area(measured) == 1
    assert best(measured) == (0.4, 0)
    mixed = [(0.1, False), (0.6, False), (0.5, True), (0.9, True), (0.2, False)]
    assert area(mixed) == pytest.approx(5 / 6)
    assert best(mixed)[1] == 1
    assert area([(0.5, True), (0.5, False)]) == 0.5
    assert math.isnan(area([(0.1, False)]))
    assert best([(0.1, False), (0.2, False)])[1] == 0


def test_every_arm_is_answered_read_and_summed_up():
    lm = tiny("llama")
    prompts = [prompt(seed, 5) for seed in range(3)]

    def arm(layers, strength):
        edits = tuple(Edit(Site(layer), Add(strength * direction(layer)), Positions.all()) for layer in layers)
        return Arm("planted", False, len(layers), Steering(edits), prompts)

    with warnings.catch_warnings():
        warnings.simplefilter("error", DoseWarning)
        cells = measure(lm, [arm([1], 0.0001), arm([1, 2], 300.0)], prompts, 8)
    assert [len(cell.doses) for cell in cells] == [1, 2]
    assert cells[0].broken == ()
    assert cells[0].perplexity == pytest.approx(1, abs=0.05)
    assert max(cells[1].doses) > 1
    results = results_of([*cells, Cell(cells[0].arm, (0.5,), ("perplexity too high: 9",), 4.0, 0.0)])
    assert {result.case for result in results} >= {
        "planted, 1 layer, root of squares 0.00",
        "learned as differences, 3 cells",
    }
    assert any(result.metric == "perplexity over unsteered (perplexity too high)" for result in results)
