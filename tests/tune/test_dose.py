"""The strength at which a steering has the dose that is asked for, on tiny models."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import direction, prompt, tiny

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import (
    Ablate,
    Add,
    AddScaled,
    BiasScores,
    Card,
    Edit,
    HoldElements,
    Positions,
    ReadWrite,
    Rotate,
    ScaleElements,
    SetProjection,
    Site,
    Steering,
    Threshold,
)
from trimtab.tune import at_dose

PROMPTS = [prompt(seed, 4 + seed) for seed in range(3)]


@pytest.fixture(scope="module")
def lm():
    return tiny("llama")


def steering(lm, *operations, layers=(1,), positions=None, strength=1.0):
    where = Positions.from_last_prompt_token() if positions is None else positions
    edits = [Edit(Site(layer), operation, where, strength) for layer in layers for operation in operations]
    return Steering(tuple(edits), Card("planted", model=lm.identity))


def unit(seed=0):
    return direction(seed) / direction(seed).norm()


OPERATIONS = {
    "add": Add(3.0 * unit()),
    "add, faint": Add(1e-4 * unit()),
    "add, norm kept": Add(unit(), keep_norm=True),
    "scaled": AddScaled(unit()),
    "projection": SetProjection(unit(), 5.0),
    "one-sided": SetProjection(unit(), 5.0, one_sided=True),
    "elements": ScaleElements(torch.ones_like(unit())),
    "rotation": Rotate(unit(), 0.5),
    "read and write": ReadWrite(unit()[None], unit(1)[None], bias=1.0),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("layers", [(1,), (0, 1, 2, 3)], ids=["one", "all"])
def test_the_dose_is_what_was_asked_for(lm, operation, layers):
    learned = steering(lm, operation, layers=layers)
    dosed = at_dose(lm, learned, 0.2, PROMPTS)
    assert dosed.dose == pytest.approx(0.2, rel=0.02)
    assert dosed.steering == dosed.factor * learned
    answers = lm.generate(PROMPTS, dosed.steering, max_new_tokens=8)
    assert sum(answer.applied.overall for answer in answers) / 3 == pytest.approx(dosed.dose)


def test_the_other_way_stays_the_other_way(lm):
    learned = steering(lm, Add(unit()), strength=-2.0)
    dosed = at_dose(lm, learned, 0.3, PROMPTS[0])
    assert dosed.factor > 0
    assert dosed.steering.edits[0].strength < 0


def test_additions_take_a_few_looks(lm, monkeypatch):
    looks, original = [], lm.generate
    monkeypatch.setattr(
        lm, "generate", lambda *arguments, **options: looks.append(1) or original(*arguments, **options)
    )
    at_dose(lm, steering(lm, Add(unit())), 0.2, PROMPTS)
    assert len(looks) <= 4


@pytest.mark.parametrize(
    ("operation", "kind", "name"),
    [
        (HoldElements(unit()), "residual", "hold_elements"),
        (BiasScores(1.0), "scores", "bias_scores"),
    ],
)
def test_what_has_no_such_strength_is_refused_by_name(lm, operation, kind, name):
    acting = Steering((Edit(Site(1, kind), operation),))
    with pytest.raises(UnsupportedError, match=f"{name}.*give a strength"):
        at_dose(lm, acting, 0.2, PROMPTS)


@pytest.mark.parametrize("dose", [0, -0.1, math.nan, math.inf, True, "0.2"])
def test_a_dose_is_a_positive_number(lm, dose):
    with pytest.raises(TrimtabError, match=r"a dose is a number above 0, such as 0\.2"):
        at_dose(lm, steering(lm, Add(unit())), dose, PROMPTS)


def test_what_doesnt_act_has_no_dose(lm):
    shut = steering(lm, Add(unit())).when(Threshold(Site(0), unit(), 1e9))
    for acting in (shut, 0.0 * steering(lm, Add(unit()))):
        with pytest.raises(TrimtabError, match="nothing is steered on these prompts"):
            at_dose(lm, acting, 0.2, PROMPTS)


def test_a_dose_that_cant_be_had_names_the_nearest(lm):
    """With the norm kept an edit is at most twice as long as the activation."""
    with pytest.raises(
        TrimtabError, match=r"no strength was found at which the dose is 5: at .* it is 1\.\d+; ask for"
    ):
        at_dose(lm, steering(lm, Add(unit(), keep_norm=True)), 5, PROMPTS[0])
    with pytest.raises(TrimtabError, match="no strength was found"):
        at_dose(lm, 1e-300 * steering(lm, Ablate(unit())), 0.2, PROMPTS[0])
