"""trimtab against what the released codes compute, as recorded on the default model (see `released.py` for how)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from parity import released

from trimtab import (
    LM,
    Add,
    BiasScores,
    Edit,
    Positions,
    Rejection,
    ScaleScores,
    Site,
    Steering,
    Threshold,
    pasta,
)
from trimtab.methods.sadi import learn_sadi
from trimtab.steering import emphasis
from trimtab.text.pairs import Pair

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]
RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "recorded.json").read_text())


def same(answer: Any, expected: dict[str, Any], tolerance: float = 5e-4) -> None:
    assert list(answer.token_ids) == expected["tokens"]
    assert answer.logprobs == pytest.approx(expected["logprobs"], abs=tolerance)


def steered(lm: LM, prompt: str, steering: Steering) -> Any:
    (answer,) = lm.generate(prompt, steering, max_new_tokens=released.NEW, logprobs=True)
    return answer


def over(spans: list[tuple[int, int]], bias: float) -> Steering:
    parts = [emphasis(BiasScores(bias, tuple(heads), outside=True), spans, [n]) for n, heads in released.HEADS.items()]
    return Steering(tuple(edit for part in parts for edit in part.edits))


def test_pasta(lm: LM) -> None:
    """Over the released span, which has a token too many in front; with two spans each is lowered by the other."""
    recorded = RECORDED["pasta"]
    span = tuple(recorded["span"])
    (true,) = lm.spans(released.PROMPT, released.PHRASE)
    assert (true[0] - 1, true[1]) == span
    same(steered(lm, released.PROMPT, over([span], math.log(0.01))), recorded["exclude"])
    same(steered(lm, released.PROMPT, over([span], -math.log(100))), recorded["include"])
    two = over([span], math.log(0.1)) + over([(4, 7)], math.log(0.1))
    same(steered(lm, released.PROMPT, two), recorded["exclude two"])
    included = pasta(lm, released.PROMPT, released.PHRASE, released.HEADS, alpha=100, include=True)
    assert included.edits == over([true], -math.log(100)).edits


@pytest.mark.parametrize("site", released.PLACES)
def test_sadi(lm: LM, site: str) -> None:
    """The same heads, neurons and elements, and the same law of the next token with all layers held."""
    recorded, count = RECORDED["sadi"][site], released.COUNTS[site]
    pairs = [Pair(right, wrong, question, "answers") for question, right, wrong in released.PAIRS]
    held = learn_sadi(lm, pairs, site=site, k=count, delta=released.STRENGTH - 1, score="signed", mode="frozen")
    chosen = held.card.measured["chosen"]
    assert sorted([int(layer), i] for layer, units in chosen.items() for i in units) == recorded["chosen"]
    tokens = recorded["top"]
    (answer,) = lm.generate(released.QUESTION, held, max_new_tokens=1, logprobs=True)
    assert (answer.token_ids[0], answer.logprobs[0]) == (tokens[0], pytest.approx(recorded["logprobs"][0], abs=1e-3))


def test_directer(lm: LM) -> None:
    """Over the released span, which has a token too many behind: the tokens, the order of the layers, the rungs."""
    recorded = RECORDED["directer"]
    start, stop = recorded["span"]
    assert list(lm.spans(released.PROMPT, released.PHRASE)) == [(start, stop - 1)]
    steering = emphasis(ScaleScores(100.0), [(start, stop)], range(lm.layout.layers))
    theirs = Rejection(ranking="repo", min_layers=2)
    (answer,) = lm.generate(released.PROMPT, steering, rejection=theirs, max_new_tokens=released.NEW)
    assert list(answer.token_ids) == recorded["tokens"]
    assert list(answer.trace.order) == recorded["order"]
    steps = list(zip(answer.trace.steps, recorded["rungs"], strict=True))
    assert all(step.candidate == rung for step, rung in steps[1:])  # at the first token their gate is off
    assert any(step.open for step, _ in steps)


def test_cast(lm: LM) -> None:
    """Checked and added at blocks' inputs; the first prompt stays below the threshold."""
    site = Site(released.CONDITION, "block_input")
    gate = Threshold(site, released.unit(1), released.THRESHOLD, "cast", positions=Positions.all(), pool="mean")
    behaviour = [
        Edit(Site(layer, "block_input"), Add(released.unit(layer)), Positions.all(), released.ADDED, gate)
        for layer in released.BEHAVIOUR
    ]
    above = []
    for prompt, recorded in zip(released.PROMPTS, RECORDED["cast"], strict=True):
        (read,) = lm.capture(prompt, [site], Positions.all())
        assert gate.value(gate.reading.pooled(read[site])) == pytest.approx(recorded["similarity"], abs=1e-6)
        above.append(recorded["similarity"] > released.THRESHOLD)
        same(steered(lm, prompt, Steering(tuple(behaviour))), recorded)
    assert set(above) == {True, False}
