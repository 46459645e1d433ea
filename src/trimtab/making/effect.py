"""How far a steering goes from the one side's answers to the other's: by log-probabilities, without a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from trimtab.engines.transformers.forced import Forced, forcing, passes
from trimtab.evaluate.intervals import RESAMPLES, Interval
from trimtab.learn.own_answers import help_changes
from trimtab.making.contrasts import Answer, Contrasts

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.steering import Steering


@dataclass(frozen=True)
class Effect:
    """For each question, in nats a token: how likely the wanted answers are, and by how much more than the others."""

    wanted: Mapping[str, float]
    leads: Mapping[str, float]


def effect(lm: LM, steering: Steering | None, found: Contrasts) -> Effect:
    """The steering's on answers to questions, given without a system prompt.

    Args:
        lm: The model.
        steering: What acts from the last prompt token on, or nothing.
        found: The answers for and against.
    """
    return _effect(found, *(_likelihoods(lm, steering, side, "bare") for side in (found.positive, found.negative)))


def prompted(lm: LM, found: Contrasts) -> Effect:
    """That of the system prompts for the idea, under which the wanted answers were written.

    The others' answers are read under the prompt for the idea, too.
    """
    positive = _likelihoods(lm, None, found.positive, "own")
    return _effect(found, positive, _likelihoods(lm, None, found.negative, "other"))


def share_of(unsteered: Effect, steered: Effect, told: Effect, seed: int = 0) -> Interval:
    """The part of the system prompt's effect that a steering has: a ratio of means, and its bootstrap interval.

    Questions are drawn, each with all three of its values.
    """
    questions = list(unsteered.leads)
    base, mine, full = (np.array([one.leads[q] for q in questions]) for one in (unsteered, steered, told))
    drawn = np.random.default_rng(seed).integers(len(questions), size=(RESAMPLES, len(questions)))
    ratios = (mine - base)[drawn].mean(1) / (full - base)[drawn].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(float((mine - base).mean() / (full - base).mean()), float(low), float(high))


def _effect(found: Contrasts, positive: Sequence[float], negative: Sequence[float]) -> Effect:
    wanted, unwanted = (_by_question(*one) for one in ((found.positive, positive), (found.negative, negative)))
    questions = found.questions
    return Effect(
        {question: wanted[question] for question in questions},
        {question: wanted[question] - unwanted[question] for question in questions},
    )


def _by_question(answers: Sequence[Answer], values: Sequence[float]) -> dict[str, float]:
    """The mean over each question's answers."""
    found: dict[str, list[float]] = {}
    for one, value in zip(answers, values, strict=True):
        found.setdefault(one.question, []).append(value)
    return {question: sum(some) / len(some) for question, some in found.items()}


@torch.no_grad()
def _likelihoods(lm: LM, steering: Steering | None, answers: Sequence[Answer], prompt: str) -> list[float]:
    """The mean log-probability of each answer's tokens after one of its prompts."""
    texts = [Forced(getattr(one, prompt), one.ids) for one in answers]
    changes = {} if steering is None else help_changes(steering)
    found: list[float] = []
    with forcing(lm.model, lm.layout, list(changes)) as run, torch.no_grad():
        for numbers in passes(lm.model, texts):
            some = [texts[i] for i in numbers]
            for text, logits in zip(some, run.logits(some, changes), strict=True):
                ids = torch.tensor(text.answer, device=logits.device)[:, None]
                found.append(float(logits.log_softmax(-1).gather(-1, ids).mean()))
    return found
