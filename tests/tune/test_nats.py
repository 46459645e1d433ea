"""The strength at which a steering takes the model so many nats from itself, on tiny models."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import direction, prompt, tiny

from trimtab.errors import TrimtabError
from trimtab.evaluate.divergence import Divergence, divergence, reference
from trimtab.steering import Add, Card, Edit, Positions, Rotate, SetProjection, Site, Steering
from trimtab.tune import at_nats
from trimtab.tune import nats as module
from trimtab.tune.nats import InexactWarning, NotMonotoneWarning

PROMPTS = [prompt(seed, 4 + seed) for seed in range(3)]


@pytest.fixture(scope="module")
def lm():
    return tiny("llama")


@pytest.fixture(scope="module")
def base(lm):
    return reference(lm, PROMPTS, tokens=4)


def steering(lm, operation, strength=1.0):
    edit = Edit(Site(1), operation, Positions.from_last_prompt_token(), strength)
    return Steering((edit,), Card("planted", model=lm.identity))


def unit(seed=0):
    return direction(seed) / direction(seed).norm()


@pytest.mark.parametrize("nats", [0.05, 0.25, 1.0])
@pytest.mark.parametrize("strength", [0.001, 1.0, 300.0, -1.0])
def test_the_divergence_is_what_was_asked_for(lm, base, nats, strength):
    learned = steering(lm, Add(unit()), strength)
    dosed = at_nats(lm, learned, nats, base)
    assert dosed.divergence.p95 == pytest.approx(nats, rel=0.02)
    assert dosed.steering == dosed.factor * learned
    assert divergence(lm, dosed.steering, PROMPTS, tokens=4) == dosed.divergence
    assert dosed.monotone


def test_what_is_not_monotone_is_said_and_the_weakest_strength_taken(lm, base, monkeypatch):
    """A divergence that rises to 1.5 at strength 1, falls to 0.1 at 4, and rises again."""

    def humped(_lm, acting, _base, **_):
        s = acting.edits[0].strength
        return Divergence(((1.5 * s if s <= 1 else max(0.1, 1.5 - 0.5 * s) if s <= 4 else s / 4,),))

    monkeypatch.setattr(module, "divergence", humped)
    learned = steering(lm, Add(unit()))
    assert at_nats(lm, learned, 1.2, base).factor == pytest.approx(0.8, rel=0.02)
    with pytest.warns(NotMonotoneWarning, match="the weakest strength that was found"):
        dosed = at_nats(lm, 4 * learned, 1.9, base)
    assert not dosed.monotone
    assert dosed.divergence.p95 == pytest.approx(1.9, rel=0.02)


def step(monkeypatch, low, high):
    """A divergence that is `low` nats below strength 0.7, and `high` from there on."""

    def stepped(_lm, acting, _base, **_):
        return Divergence(((low if acting.edits[0].strength < 0.7 else high,),))

    monkeypatch.setattr(module, "divergence", stepped)


@pytest.mark.parametrize("nats", [1.0, 2.0])
def test_a_divergence_that_is_jumped_over_is_an_error(lm, base, monkeypatch, nats):
    step(monkeypatch, 0.1, 5.0)
    with pytest.raises(TrimtabError, match=rf"jumps over {nats:g} nats: the nearest is 0.1, at 0\.\d+ times") as seen:
        at_nats(lm, steering(lm, Add(unit())), nats, base)
    assert str(seen.value).endswith("ask for a divergence near that, or give a strength")


@pytest.mark.parametrize(("low", "high", "nearest"), [(0.1, 1.1, 1.1), (0.8, 4.0, 0.8)])
def test_a_divergence_that_is_nearly_reached_is_said(lm, base, monkeypatch, low, high, nearest):
    step(monkeypatch, low, high)
    with pytest.warns(InexactWarning, match=rf"jumps over 1 nats: the nearest is {nearest}, at "):
        dosed = at_nats(lm, steering(lm, Add(unit())), 1.0, base)
    assert dosed.divergence.p95 == nearest


@pytest.mark.filterwarnings("error")
def test_a_divergence_that_is_reached_is_no_warning(lm, base, monkeypatch):
    step(monkeypatch, 0.1, 1.015)
    assert at_nats(lm, steering(lm, Add(unit())), 1.0, base).divergence.p95 == 1.015


def test_a_divergence_that_cannot_be_had_says_how_far_it_goes(lm, base):
    """A projection that is set to 0 changes no more than there is of it, whatever its strength; no push of nothing."""
    with pytest.raises(TrimtabError, match=r"changes nothing on these prompts: its vectors are 0"):
        at_nats(lm, steering(lm, Add(torch.zeros(32))), 1.0, base)


@pytest.mark.parametrize("nats", [0, -1, math.inf, math.nan, True, "1"])
def test_a_divergence_is_a_positive_number(lm, base, nats):
    with pytest.raises(TrimtabError, match="a divergence is a number of nats above 0, such as 1"):
        at_nats(lm, steering(lm, Add(unit())), nats, base)


@pytest.mark.parametrize("operation", [SetProjection(unit(), 5.0), Rotate(unit(), 0.4)])
def test_other_operations_have_such_strengths_too(lm, base, operation):
    dosed = at_nats(lm, steering(lm, operation), 0.02, base)
    assert dosed.divergence.p95 == pytest.approx(0.02, rel=0.02)
