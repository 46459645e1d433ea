"""How far a steering goes from the one side's answers to the other's: by log-probabilities, without a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from trimtab.engines.transformers.forced import Forced, forcing, passes
from trimtab.errors import TrimtabError
from trimtab.evaluate.intervals import RESAMPLES, Interval, paired_bootstrap
from trimtab.learn.own_answers import help_changes
from trimtab.making.contrasts import Answer, Contrasts
from trimtab.steering import Always, Positions

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.steering import Steering


READ = (Positions.from_last_prompt_token(), Positions.all())
"""Where what is read may act."""


@dataclass(frozen=True)
class Effect:
    """For each question, in nats per token: how likely the wanted answers are, and by how much more than the
    others."""

    wanted: Mapping[str, float]
    leads: Mapping[str, float]


def effect(lm: LM, steering: Steering | None, contrasts: Contrasts) -> Effect:
    """The steering's on answers to questions, given without a system prompt.

    Args:
        lm: The model.
        steering: What acts from the last prompt token on, or at all tokens, or nothing.
        contrasts: The answers for and against.

    Raises:
        TrimtabError: A steering with other positions, a gate, or two edits at one site, which aren't read here.
    """
    _check_read(steering)
    return _effect(
        contrasts, *(_likelihoods(lm, steering, side, "bare") for side in (contrasts.positive, contrasts.negative))
    )


def prompted(lm: LM, contrasts: Contrasts) -> Effect:
    """That of the system prompts for the idea, under which the wanted answers were written.

    The others' answers are read under the prompt for the idea, too.
    """
    positive = _likelihoods(lm, None, contrasts.positive, "own")
    return _effect(contrasts, positive, _likelihoods(lm, None, contrasts.negative, "other"))


def share_of(unsteered: Effect, steered: Effect, by_prompt: Effect, seed: int = 0) -> Interval:
    """The part of the system prompt's effect that a steering has: a ratio of means, and its bootstrap interval.

    Questions are drawn, each with all three of its values. A draw in which the system prompt has no effect counts as 0.

    Raises:
        TrimtabError: The system prompt has no effect, or one away from what is wanted: there is nothing to share.
    """
    questions = list(unsteered.leads)
    base, mine, full = (
        np.array([measured.leads[q] for q in questions]) for measured in (unsteered, steered, by_prompt)
    )
    if not (full - base).mean() > 0:
        raise TrimtabError(
            "the system prompts themselves don't bring the model nearer to the wanted answers, so there is nothing to"
            " measure a steering by; say it in clearer words, or take a larger model"
        )
    drawn = np.random.default_rng(seed).integers(len(questions), size=(RESAMPLES, len(questions)))
    gains, whole = (mine - base)[drawn].mean(1), (full - base)[drawn].mean(1)
    ratios = np.divide(gains, whole, out=np.zeros_like(gains), where=whole > 0)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(float((mine - base).mean() / (full - base).mean()), float(low), float(high))


def gain_of(unsteered: Mapping[str, float], steered: Mapping[str, float], seed: int = 0) -> Interval:
    """By how much a steering raises these values, by question: the mean difference, and its bootstrap interval."""
    return paired_bootstrap(list(unsteered.values()), [steered[question] for question in unsteered], seed=seed)


def _check_read(steering: Steering | None) -> None:
    edits = steering.edits if steering is not None else ()
    for edit in edits:
        if edit.positions != edits[0].positions or edit.positions not in READ or edit.gate != Always():
            raise TrimtabError(
                f"an effect is read of what acts from the last prompt token on or at all tokens, without a gate: {edit}"
            )
    if len({edit.site for edit in edits}) < len(edits):
        raise TrimtabError("effects are read of one edit a site; add up what acts at the same one")


def _effect(contrasts: Contrasts, positive: Sequence[float], negative: Sequence[float]) -> Effect:
    wanted, unwanted = (
        _by_question(*pair) for pair in ((contrasts.positive, positive), (contrasts.negative, negative))
    )
    questions = contrasts.questions
    return Effect(
        {question: wanted[question] for question in questions},
        {question: wanted[question] - unwanted[question] for question in questions},
    )


def _by_question(answers: Sequence[Answer], values: Sequence[float]) -> dict[str, float]:
    """The mean over each question's answers."""
    by_question: dict[str, list[float]] = {}
    for answer, value in zip(answers, values, strict=True):
        by_question.setdefault(answer.question, []).append(value)
    return {question: sum(some) / len(some) for question, some in by_question.items()}


@torch.no_grad()
def _likelihoods(lm: LM, steering: Steering | None, answers: Sequence[Answer], prompt: str) -> list[float]:
    """The mean log-probability of each answer's tokens after one of its prompts."""
    prompts: list[tuple[int, ...]] = [getattr(each, prompt) for each in answers]
    if steering is not None and steering.edits[0].positions == Positions.all():
        # a forced pass changes what comes from the last prompt token on: here that is the first token of all
        texts = [Forced(own[:1], (*own[1:], *each.ids)) for own, each in zip(prompts, answers, strict=True)]
    else:
        texts = [Forced(own, each.ids) for own, each in zip(prompts, answers, strict=True)]
    changes = {} if steering is None else help_changes(steering)
    likelihoods: list[float] = []
    with forcing(lm.model, lm.layout, list(changes)) as run, torch.no_grad():
        for numbers in passes(lm.model, texts):
            logits = run.logits([texts[i] for i in numbers], changes)
            for answer, row in zip([answers[i] for i in numbers], logits, strict=True):
                ids = torch.tensor(answer.ids, device=row.device)[:, None]
                likelihoods.append(float(row[-len(answer.ids) :].log_softmax(-1).gather(-1, ids).mean()))
    return likelihoods
