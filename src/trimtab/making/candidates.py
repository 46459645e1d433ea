"""What could bring an idea about: mean differences at several depths and strengths, and a distilled vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.engines.transformers.read import Text
from trimtab.learn.contrast import contrast, versions
from trimtab.learn.own_answers import Answers
from trimtab.making.contrasts import Contrasts
from trimtab.making.effect import Effect, effect
from trimtab.making.idea import Idea
from trimtab.methods.distill import learn_from_answers
from trimtab.steering import Add, Card, Edit, Positions, Site, Steering

if TYPE_CHECKING:
    from collections.abc import Callable

    from trimtab.lm import LM

DEPTHS = (0.3, 0.4, 0.5, 0.6, 0.7)
STRENGTHS = (1.0, 2.0, 3.0)
BAND = (0.3, 0.7)
BAND_STRENGTHS = (0.25, 0.5)
"""A mean difference at one depth, or at every block of a band, where the differences of all blocks add up."""
DISTILL_STRENGTHS = (1.0, 1.5)
STEPS, RATE = 16, 0.01


@dataclass(frozen=True)
class Candidate:
    """A steering, what to call it, and what it does on questions that it wasn't learned from."""

    name: str
    steering: Steering
    effect: Effect

    @property
    def likelihood(self) -> float:
        """How likely it makes the wanted answers, in nats a token."""
        return _mean(self.effect.wanted)

    @property
    def lead(self) -> float:
        """By how much more likely it makes them than the unwanted ones, in nats a token."""
        return _mean(self.effect.leads)


def candidates(
    lm: LM,
    idea: Idea,
    learned: Contrasts,
    held_out: Contrasts,
    *,
    distill: bool,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Candidate]:
    """All of them, the best one first: by the lead of the wanted answers over the unwanted ones.

    Pushing too hard makes all answers unlikely. So those under which the wanted answers are no likelier than without
    any steering come after all others.

    Args:
        lm: The model.
        idea: What is wanted.
        learned: The answers to learn from.
        held_out: The answers to other questions, which decide.
        distill: Whether to distill as well, which takes longest.
        seed: Of the order of answers in the descent.
        progress: Told of candidates that were tried.
        say: Told in words how the descent stands.
    """
    trials = mean_differences(lm, idea, learned)
    total = len(trials) + (len(DISTILL_STRENGTHS) if distill else 0)
    found: list[Candidate] = []

    def tried(name: str, steering: Steering) -> None:
        found.append(Candidate(name, steering, effect(lm, steering, held_out)))
        if progress is not None:
            progress(len(found), total)

    for name, steering in trials:
        tried(name, steering)
    if distill:
        vector = distilled(lm, idea, learned, seed, say)
        for strength in DISTILL_STRENGTHS:
            tried(f"distilled, strength {strength:g}", strength * vector)
    least = _mean(effect(lm, None, held_out).wanted)
    return sorted(found, key=lambda one: (one.likelihood <= least, -one.lead))


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def mean_differences(lm: LM, idea: Idea, learned: Contrasts) -> list[tuple[str, Steering]]:
    """Means over the answers' tokens, wanted less unwanted, each side under its own system prompt.

    Chen et al., arXiv 2507.21509, section 2.2: one vector a block, read over the answer.
    """
    last = lm.layout.layers - 1
    singles = sorted({min(round(depth * lm.layout.layers), last) for depth in DEPTHS})
    low, high = (min(round(depth * lm.layout.layers), last) for depth in BAND)
    band = list(range(low, high + 1))
    moments = contrast(lm, _pairs(learned), sorted({*singles, *band}))

    def steering(layers: Sequence[int], strength: float) -> Steering:
        edits = [
            Edit(Site(at), Add(moments[at].difference.float()), Positions.from_last_prompt_token()) for at in layers
        ]
        card = Card(
            method="caa",
            model=lm.identity,
            options={"idea": idea.name, "layers": list(layers), "read_at": "answer", "norm": "raw"},
            measured={"pairs": moments[layers[0]].count, "agreement": round(moments[layers[0]].agreement, 6)},
            versions=versions(),
        )
        return strength * Steering(tuple(edits), card)

    alone = [(f"mean difference at layer {at}, strength {s:g}", steering([at], s)) for at in singles for s in STRENGTHS]
    together = [
        (f"mean difference at layers {low} to {high}, strength {s:g}", steering(band, s)) for s in BAND_STRENGTHS
    ]
    return alone + together


def distilled(lm: LM, idea: Idea, learned: Contrasts, seed: int, say: Callable[[str], None] | None = None) -> Steering:
    """A vector at every block under which the model gives the wanted answers without a system prompt."""
    lessons = tuple(learned.lessons)
    answers = Answers(lessons, lessons, ())
    options = {"idea": idea.name}
    return learn_from_answers(
        lm, answers, rank=0, steps=STEPS, rate=RATE, with_prompt=0.0, seed=seed, options=options, say=say
    )


def _pairs(learned: Contrasts) -> list[tuple[Text, Text]]:
    """Each wanted answer beside an unwanted one to the same question, as often as there are both."""
    pairs = []
    for question in learned.questions:
        positive, negative = (
            [one for one in side if one.question == question] for side in (learned.positive, learned.negative)
        )
        for mine, other in zip(positive, negative, strict=False):
            texts = [
                Text([*one.own, *one.ids], list(range(len(one.own), len(one.own) + len(one.ids))))
                for one in (mine, other)
            ]
            pairs.append((texts[0], texts[1]))
    return pairs
