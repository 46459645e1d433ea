"""What `trimtab tune` says to try next, by what the search has seen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trimtab.commands.tune_advice import advice
from trimtab.evaluate.decision import decide
from trimtab.evaluate.intervals import Interval
from trimtab.tune import Setting, Tuned
from trimtab.tune.split import Split
from trimtab.tune.tune import CandidateResult, HeldOut

BASE = CandidateResult(None, 6, 0.2, 0.2, 0.0, 3.0, ())
SPLIT = Split((0, 1), (2,))


def row(layer, strength, score, broken=()):
    return CandidateResult(Setting(layer, strength, "all", "add"), 6, score, 0.2, 0.1, 4.0, broken)


def tuned(*rows, **more):
    none = Tuned(None, None, "why", rows, None, SPLIT, False, False, 9, 9)
    return replace(none, **more)


def held_out(before, after):
    decision = decide(before, after)
    return HeldOut(len(before), decision.after, decision.before, decision.difference, (), decision)


def advice_on(result, **options):
    return " | ".join(advice(result, **{"blocks": 6, "instruction": None, "instructed": True, **options}))


@pytest.mark.parametrize(
    ("result", "said", "unsaid"),
    [
        (tuned(BASE, row(1, 0.5, 0.2), row(2, 1.5, 0.2)), "larger --strengths, such as 2.25,3,4.5", "smaller"),
        (
            tuned(BASE, row(1, 0.5, 0.8, ("empty",)), row(2, 1.5, 0.2)),
            "smaller --strengths, such as 0.125,0.25",
            "larger",
        ),
        (tuned(BASE, row(1, 1, 0.1, ("empty",))), "1 of 6 blocks were tried: --layers all", "--strengths"),
        (tuned(*[BASE, *(row(n, 1, 0.2) for n in range(6))]), "trimtab methods", "--layers all"),
        (tuned(replace(BASE, score=0.95), row(1, 1, 0.9)), "95% comply already", "cut short"),
        (tuned(BASE, row(1, 1, 0.5), row(2, 1, 0.6, ("empty",))), "2 of 6 blocks", "--strengths"),
        (
            tuned(BASE, row(1, 1, 0.5), held_out=HeldOut(5, 1.0, 1.0, Interval(0, 0, 0), ())),
            "100% comply already",
            "cut short",
        ),
        (tuned(BASE, exhausted=True), "a larger --budget-tokens", "--strengths"),
        (
            tuned(BASE, row(1, 1, 0.5), held_out=HeldOut(3, 0.2, 0.2, Interval(0, -1, 1), ())),
            "on 3 held-out prompts the best may be luck",
            "cut short",
        ),
        (
            tuned(BASE, row(1, 1, 0.5), held_out=held_out([0] * 10, [1, 1, 1] + [0] * 7)),
            "on 10 held-out prompts the best may be luck, whatever the --margin: give more prompts",
            "smaller --margin",
        ),
        (
            tuned(BASE, row(1, 1, 0.5), held_out=held_out([1] * 10, [0] * 10)),
            "on 10 held-out prompts the best was worse than not steering",
            "smaller --margin",
        ),
        (
            tuned(BASE, row(1, 1, 0.5), held_out=held_out([0] * 80, [1] * 6 + [0] * 74)),
            "the best gains +0.07, which is more than chance but not above --margin: a smaller --margin accepts it",
            "give more prompts",
        ),
    ],
)
def test_what_is_said_follows_from_what_was_seen(result, said, unsaid):
    assert said in advice_on(result)
    assert unsaid not in advice_on(result)


def test_an_instruction_can_be_trained_for():
    assert 'trimtab learn distill --instruction "Shout!" --out FILE' in advice_on(
        tuned(BASE, row(1, 1, 0)), instruction="Shout!"
    )


def test_what_follows_unasked_is_searched_for_without_asking():
    easy = tuned(replace(BASE, score=1.0), row(1, 1, 1.0))
    assert "--without-instruction" in advice_on(easy)
    assert "--without-instruction" not in advice_on(easy, instructed=False)
