"""When a dose is warned about: over all layers, and later for what was trained."""

from __future__ import annotations

import math
import warnings
from pkgutil import iter_modules

import pytest
from tiny import prompt, tiny

import trimtab.methods
from trimtab.engines.answer import Applied, Dose, Generation
from trimtab.engines.doses import DOSE_WARNING, TRAINED_DOSE_WARNING, DoseWarning, warn_of_doses
from trimtab.steering import Add, Card, Edit, Positions, Site, Steering
from trimtab.steering.card import TRAINED

MANUAL, DISTILLED = Steering(), Steering(card=Card("distill"))


def answer(*ratios):
    doses = tuple(Dose(layer, ratio, 3) for layer, ratio in enumerate(ratios))
    return Generation("", (), "stop", 1, Applied((), doses))


def said(answers, steerings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_doses(answers, steerings)
    return [str(warning.message) for warning in caught]


def test_doses_of_layers_come_together_by_their_squares():
    assert answer().applied.overall == 0
    assert answer(0.25).applied.overall == answer(0.25).applied.dose == 0.25
    assert answer(0.3, 0.4).applied.overall == pytest.approx(0.5)
    assert answer(*[0.1] * 25).applied.overall == pytest.approx(0.5)


def test_many_small_pushes_are_warned_about_as_one_large_one_is():
    near = 0.99 * DOSE_WARNING
    assert said([answer(near)], [MANUAL]) == []
    assert said([answer(*[near / 3] * 9)], [MANUAL]) == []
    (warning,) = said([answer(0.41)], [MANUAL])
    assert warning.startswith("at layer 0 the edit is 0.41 times as long as the activation; above 0.3 text tends to")
    assert warning.endswith("Lower the strength")
    (many,) = said([answer(0.1, 0.25, *[0.17] * 4)], [MANUAL])
    assert (
        "at layer 1 the edit is 0.25 times as long as the activation, and over 6 layers 0.43 times; above 0.3" in many
    )
    assert many.endswith("Lower the strength or steer at fewer layers")


def test_what_was_trained_may_push_harder():
    assert said([answer(1.55)], [DISTILLED]) == []
    assert said([answer(1.55)], [None]) != []
    assert f"above {TRAINED_DOSE_WARNING:g} text" in said([answer(1.01 * TRAINED_DOSE_WARNING)], [DISTILLED])[0]


def test_the_answer_that_is_furthest_above_its_own_limit_is_named():
    both = [answer(2.2), answer(0.9)]
    assert "is 0.9 times" in said(both, [DISTILLED, MANUAL])[0]
    assert "is 2.2 times" in said(both, [DISTILLED, DISTILLED])[0]
    assert (
        "is 2.2 times" in said([answer(0.9), answer(0.1), answer(2.2), answer(0.9)], [DISTILLED, MANUAL])[0]
    )  # two answers a request


def test_an_infinite_dose_is_warned_about():
    assert len(said([answer(math.inf)], [DISTILLED])) == 1


def test_a_sum_counts_as_trained_if_all_of_it_was():
    trained, learned = Steering(card=Card("bipo")), Steering(card=Card("caa"))
    assert (trained + DISTILLED).card.trained
    assert (2.0 * trained).card.trained
    assert not (trained + learned).card.trained
    assert not MANUAL.card.trained


def test_the_methods_that_descend_are_those_that_count_as_trained():
    trained = set()
    for module in iter_modules(trimtab.methods.__path__):
        if hasattr(__import__(f"trimtab.methods.{module.name}", fromlist=["x"]), "Descent"):
            trained.add(module.name)
    assert trained == TRAINED


def test_generate_looks_at_each_requests_own_steering():
    lm = tiny("llama")
    row = lm.model.get_output_embeddings().weight[3].detach()
    row = row / row.norm() * lm.capture(prompt(0, 5), [2])[0][Site(2)].norm()
    edits = (Edit(Site(2), Add(0.8 * row), Positions.all()),)
    learned, trained = (Steering(edits, Card(name, model=lm.identity)) for name in ("caa", "reps"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (free,) = lm.generate(prompt(0, 5), trained, max_new_tokens=2)
    assert DOSE_WARNING < free.applied.overall < TRAINED_DOSE_WARNING
    with pytest.warns(DoseWarning, match="at layer 2 the edit is"):
        lm.generate([prompt(0, 5)] * 2, [trained, learned], max_new_tokens=2)
