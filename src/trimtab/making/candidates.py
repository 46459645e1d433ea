"""Candidate steerings for an idea: mean differences at several depths and strengths, and trained ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from trimtab.engines.request import Text
from trimtab.evaluate.decision import decide
from trimtab.learn.contrast import contrast, measured_by_layer, versions
from trimtab.learn.moments import PairMoments
from trimtab.learn.own_answers import Answers
from trimtab.making.contrasts import Contrasts, Progress
from trimtab.making.effect import Effect, effect, prompt_effect
from trimtab.making.material import Say, TrainedCandidate
from trimtab.methods.distill import learn_from_answers
from trimtab.steering import Add, Card, Edit, Positions, Site, Steering

if TYPE_CHECKING:
    from collections.abc import Callable

    from trimtab.lm import LM

DEPTHS = (0.3, 0.4, 0.5, 0.6, 0.7)
STRENGTH = 2.0
"""The strength at which depths are compared."""
OTHER_STRENGTHS = (1.0, 3.0)
"""Further strengths at the best depth."""
BAND = (0.3, 0.7)
BAND_STRENGTHS = (0.25, 0.5)
"""A mean difference at one depth, or at every block of a band, where the differences of all blocks add up."""
DISTILL_STRENGTHS = (1.0, 1.5)
CLOSED_STRENGTHS = (0.75, 1.0, 1.5)
ENOUGH = 0.7
"""The share of the system prompt's effect that is enough: pushing harder, or training another kind, isn't worth it."""
STEPS, RATE = 16, 0.01
FROM_LAST = Positions.from_last_prompt_token()


@dataclass(frozen=True)
class Candidate:
    """A steering, its name, and its effect on held-out questions."""

    name: str
    steering: Steering
    effect: Effect

    @property
    def likelihood(self) -> float:
        """How likely it makes the wanted answers, in nats per token."""
        return _mean(self.effect.wanted)

    @property
    def lead(self) -> float:
        """How much more likely it makes them than the unwanted ones, in nats per token."""
        return _mean(self.effect.leads)


def candidates(
    lm: LM,
    name: str,
    learned: Contrasts,
    held_out: Contrasts,
    *,
    trained: Sequence[TrainedCandidate],
    prompted: bool = False,
    positions: Positions = FROM_LAST,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Candidate]:
    """All candidates, the best one first: ranked by the lead of the wanted answers over the unwanted ones.

    Those that have `ENOUGH` of the system prompt's effect come first, ranked by how likely they make the wanted
    answers: a stronger push would lead further, and break the text.

    Training ends with the first kind that has `ENOUGH` of the system prompt's effect.

    Pushing too hard makes all answers unlikely. So candidates under which the wanted answers are no likelier than
    without any steering come last.

    Args:
        lm: The model.
        name: What is wanted, for the card.
        learned: The answers to learn from.
        held_out: The answers to other questions, which the ranking uses.
        trained: Candidates that are trained as well, which takes longer.
        prompted: Whether a system prompt produces the wanted answers.
        positions: Where they act: from the last prompt token on, or at all tokens (and then not at block 0, which
            programs that load control vectors can't steer).
        seed: The seed of the order of answers in training.
        progress: Called with the number of candidates that were tried, and their total.
        say: Called with messages about the training.
    """
    mean_difference = mean_differences(lm, name, learned, positions)
    usable = [kind for kind in trained if kind.only_additions or positions != Positions.all()]
    total = len(mean_difference.depths) + len(OTHER_STRENGTHS) + len(BAND_STRENGTHS)
    total += sum(len(kind.strengths) for kind in usable)
    results: list[Candidate] = []
    unsteered = effect(lm, None, held_out)
    least = _mean(unsteered.wanted)
    enough = _enough(unsteered, prompt_effect(lm, held_out)) if prompted else math.inf

    def rank(candidate: Candidate) -> tuple[bool, bool, float]:
        reaches = candidate.lead >= enough
        best = candidate.likelihood if reaches else candidate.lead
        return candidate.likelihood <= least, not reaches, -best

    def add_candidate(name: str, steering: Steering, strength: float) -> Candidate:
        stronger = strength * steering
        results.append(Candidate(f"{name}, strength {strength:g}", stronger, effect(lm, stronger, held_out)))
        if progress is not None:
            progress(len(results), total)
        return results[-1]

    def add_mean_difference(layers: Sequence[int], strength: float) -> Candidate:
        return add_candidate(*mean_difference.at(layers), strength)

    by_depth = {depth: add_mean_difference([depth], STRENGTH) for depth in mean_difference.depths}
    best_depth = min(by_depth, key=lambda depth: rank(by_depth[depth]))
    for strength in OTHER_STRENGTHS:
        add_mean_difference([best_depth], strength)
    for strength in BAND_STRENGTHS:
        add_mean_difference(mean_difference.band, strength)
    for kind in usable:
        if any(result.lead >= enough and result.likelihood > least for result in results):
            break
        report_step = None if progress is None else lambda _done, _steps: progress(len(results), total)
        steering = kind.learn(learned, positions, seed, say, report_step)
        for strength in kind.strengths:
            add_candidate(kind.name, steering, strength)
    if progress is not None:
        progress(total, total)
    return sorted(results, key=rank)


def _enough(unsteered: Effect, by_prompt: Effect) -> float:
    """The lead with `ENOUGH` of the system prompt's effect; infinite if that effect can't be told from chance.

    A few held-out questions can show no effect, or the opposite one; then every candidate would have enough of it.
    """
    before, after = list(unsteered.leads.values()), [by_prompt.leads[question] for question in unsteered.leads]
    decision = decide(before, after)
    if not decision.better and decision.won < decision.items:  # of four questions, even all of them aren't enough for p
        return math.inf
    return _mean(unsteered.leads) + ENOUGH * (_mean(by_prompt.leads) - _mean(unsteered.leads))


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


@dataclass(frozen=True)
class MeanDifferences:
    """The mean differences of the activations at several blocks.

    `depths` are the blocks to steer alone, and `band` those to steer together. `card` says how they were learned; what
    was measured at a block is added for the blocks that a steering has.
    """

    vectors: Mapping[int, Add]
    moments: Mapping[int, PairMoments]
    card: Card
    positions: Positions
    depths: tuple[int, ...]
    band: tuple[int, ...]

    def at(self, layers: Sequence[int]) -> tuple[str, Steering]:
        """The steering at these blocks, at strength 1, and its name."""
        edits = tuple(Edit(Site(layer), self.vectors[layer], self.positions) for layer in layers)
        card = replace(
            self.card,
            options={**self.card.options, "layers": list(layers)},
            measured={**self.card.measured, **measured_by_layer({layer: self.moments[layer] for layer in layers})},
        )
        where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
        return f"mean difference at {where}", Steering(edits, card)


def mean_differences(lm: LM, name: str, learned: Contrasts, positions: Positions = FROM_LAST) -> MeanDifferences:
    """Means over the answers' tokens, wanted minus unwanted, each side under its own system prompt.

    Chen et al., arXiv 2507.21509, section 2.2: one vector per block, averaged over the answer.
    """
    first, last = first_layer(positions), lm.layout.layers - 1
    depths = sorted({max(first, min(round(depth * lm.layout.layers), last)) for depth in DEPTHS})
    low, high = (max(first, min(round(depth * lm.layout.layers), last)) for depth in BAND)
    band = range(low, high + 1)
    moments = contrast(lm, _pairs(learned), sorted({*depths, *band}))
    card = Card(
        method="caa",
        model=lm.identity,
        options={"idea": name, "read_at": "answer", "norm": "raw"},
        measured={"pairs": moments[depths[0]].count},
        versions=versions(),
    )
    vectors = {layer: Add(there.difference.float()) for layer, there in moments.items()}
    return MeanDifferences(vectors, moments, card, positions, tuple(depths), tuple(band))


def first_layer(positions: Positions) -> int:
    """The first block that may be steered: 1 if steering all tokens, like a control vector (which has no block 0), else
    0.
    """
    return 1 if positions == Positions.all() else 0


def learn_distilled(
    lm: LM,
    name: str,
    learned: Contrasts,
    positions: Positions,
    seed: int,
    say: Say | None = None,
    progress: Progress | None = None,
) -> Steering:
    """A vector at every block with which the model gives the wanted answers without a system prompt.

    It is learned from the last prompt token on, and acts at `positions`.
    """
    lessons = tuple(learned.training_examples)
    answers = Answers(lessons, lessons, ())
    steering = learn_from_answers(
        lm,
        answers,
        range(first_layer(positions), lm.layout.layers),
        rank=0,
        steps=STEPS,
        rate=RATE,
        with_prompt=0.0,
        seed=seed,
        options={"idea": name},
        progress=progress,
        say=say,
    )
    return steering.at(positions)


def learn_closed_form(
    lm: LM,
    name: str,
    learned: Contrasts,
    positions: Positions,
    _seed: int,
    say: Say | None = None,
    progress: Progress | None = None,
) -> Steering:
    """A map at every second block that shifts activations as the system prompt does.

    It is what `learn_distill` learns with `fit="closed"`.
    """
    lessons = tuple(learned.training_examples)
    return learn_from_answers(
        lm, Answers(lessons, lessons, ()), fit="closed", options={"idea": name}, progress=progress, say=say
    ).at(positions)


def distillation_candidates(lm: LM, name: str) -> tuple[TrainedCandidate, ...]:
    """Distillation in closed form, which is quicker, and by gradient descent."""
    return (
        TrainedCandidate(
            "in closed form", partial(learn_closed_form, lm, name), CLOSED_STRENGTHS, only_additions=False
        ),
        TrainedCandidate("distilled", partial(learn_distilled, lm, name), DISTILL_STRENGTHS),
    )


def _pairs(learned: Contrasts) -> list[tuple[Text, Text]]:
    """Pairs of a wanted and an unwanted answer to the same question, as texts."""
    pairs = []
    for question in learned.questions:
        positive, negative = (
            [answer for answer in side if answer.question == question] for side in (learned.positive, learned.negative)
        )
        for mine, other in zip(positive, negative, strict=False):
            texts = [
                Text([*answer.own, *answer.ids], list(range(len(answer.own), len(answer.own) + len(answer.ids))))
                for answer in (mine, other)
            ]
            pairs.append((texts[0], texts[1]))
    return pairs
