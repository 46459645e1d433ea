"""How far a steering moves the model from one side's answers to the other's: by log-probabilities, without a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from trimtab.engines.transformers.forced import PromptAnswer, group_by_pass, teacher_forcing
from trimtab.errors import TrimtabError
from trimtab.evaluate.intervals import RESAMPLES, Interval, paired_bootstrap
from trimtab.learn.own_answers import help_changes
from trimtab.making.contrasts import Answer, Contrasts
from trimtab.steering import Always, Positions

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.steering import Steering


SUPPORTED_POSITIONS = (Positions.from_last_prompt_token(), Positions.all())
"""The positions that are supported here."""


@dataclass(frozen=True)
class Effect:
    """For each question, in nats per token: how likely the wanted answers are, and how much more so than the others."""

    wanted: Mapping[str, float]
    leads: Mapping[str, float]


def effect(lm: LM, steering: Steering | None, contrasts: Contrasts) -> Effect:
    """A steering's effect on answers to questions, conditioned on prompts without a system prompt.

    Args:
        lm: The model.
        steering: A steering that acts from the last prompt token on, or at all tokens; `None` for no steering.
        contrasts: The answers for and against.

    Raises:
        TrimtabError: A steering with other positions, a gate, or two edits at one site, which isn't supported here.
    """
    _check_read(steering)
    answers = [*contrasts.positive, *contrasts.negative]
    return _effect(contrasts, _likelihoods(lm, steering, [PromptAnswer(answer.bare, answer.ids) for answer in answers]))


def prompt_effect(lm: LM, contrasts: Contrasts) -> Effect:
    """The effect of the system prompts for the idea, under which the wanted answers were written.

    The unwanted answers are scored under the prompt for the idea, too. Answers that the model wrote have these scores
    already.
    """
    texts = [PromptAnswer(answer.own, answer.ids) for answer in contrasts.positive]
    texts += [PromptAnswer(answer.other, answer.ids) for answer in contrasts.negative]
    known = [answer.own_likelihood for answer in contrasts.positive]
    known += [answer.other_likelihood for answer in contrasts.negative]
    unknown = iter(_likelihoods(lm, None, [text for text, value in zip(texts, known, strict=True) if value is None]))
    return _effect(contrasts, [next(unknown) if value is None else value for value in known])


def check_prompted(unsteered: Effect, by_prompt: Effect) -> None:
    """Raises `TrimtabError` if the system prompt has no effect, or moves the model away from what is wanted."""
    if not np.mean([by_prompt.leads[question] - lead for question, lead in unsteered.leads.items()]) > 0:
        raise TrimtabError(
            "the system prompts themselves don't make the wanted answers more likely, so there is no effect to compare"
            " a steering with; use clearer words, or try a larger model"
        )


def share_of(unsteered: Effect, steered: Effect, by_prompt: Effect, seed: int = 0) -> Interval:
    """A steering's share of the system prompt's effect: a ratio of means, and its bootstrap interval.

    Questions are resampled, each with all three of its values. A resample in which the system prompt has no effect
    counts as 0.

    Raises:
        TrimtabError: The system prompt has no effect, or moves the model away from what is wanted.
    """
    check_prompted(unsteered, by_prompt)
    questions = list(unsteered.leads)
    base, mine, full = (
        np.array([measured.leads[q] for q in questions]) for measured in (unsteered, steered, by_prompt)
    )
    drawn = np.random.default_rng(seed).integers(len(questions), size=(RESAMPLES, len(questions)))
    gains, whole = (mine - base)[drawn].mean(1), (full - base)[drawn].mean(1)
    ratios = np.divide(gains, whole, out=np.zeros_like(gains), where=whole > 0)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(float((mine - base).mean() / (full - base).mean()), float(low), float(high))


def gain_of(unsteered: Mapping[str, float], steered: Mapping[str, float], seed: int = 0) -> Interval:
    """How much a steering raises these values, by question: the mean difference, and its bootstrap interval."""
    return paired_bootstrap(list(unsteered.values()), [steered[question] for question in unsteered], seed=seed)


def _check_read(steering: Steering | None) -> None:
    edits = steering.edits if steering is not None else ()
    for edit in edits:
        if edit.positions != edits[0].positions or edit.positions not in SUPPORTED_POSITIONS or edit.gate != Always():
            raise TrimtabError(
                f"an effect needs edits that act from the last prompt token on or at all tokens, without a gate: {edit}"
            )
    if len({edit.site for edit in edits}) < len(edits):
        raise TrimtabError("an effect needs at most one edit per site; add up the edits at the same site")


def _effect(contrasts: Contrasts, values: Sequence[float]) -> Effect:
    """The effect, from the values of the positive answers followed by those of the negative ones."""
    count = len(contrasts.positive)
    wanted = _by_question(contrasts.positive, values[:count])
    unwanted = _by_question(contrasts.negative, values[count:])
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
    return {question: sum(question_values) / len(question_values) for question, question_values in by_question.items()}


def _likelihoods(lm: LM, steering: Steering | None, texts: Sequence[PromptAnswer]) -> list[float]:
    """The mean log-probability of each answer's tokens."""
    changes = {} if steering is None else help_changes(steering)
    everywhere = steering is not None and steering.edits[0].positions == Positions.all()
    order = sorted(range(len(texts)), key=lambda i: texts[i].prompt)  # texts with the same prompt share its computation
    likelihoods = [0.0] * len(texts)
    # a forced pass steers from the last prompt token on; to steer everywhere, only the first token stays a prompt
    forced = [_from_first(texts[i]) if everywhere else texts[i] for i in order]
    with teacher_forcing(lm.model, lm.layout, list(changes)) as run, torch.no_grad():
        for numbers in group_by_pass(lm.model, forced):
            for n, row in zip(numbers, run.logits([forced[n] for n in numbers], changes), strict=True):
                answer = texts[order[n]].answer
                ids = torch.tensor(answer, device=row.device)[:, None]
                likelihoods[order[n]] = float(row[-len(answer) :].log_softmax(-1).gather(-1, ids).mean())
    return likelihoods


def _from_first(text: PromptAnswer) -> PromptAnswer:
    return PromptAnswer(text.prompt[:1], (*text.prompt[1:], *text.answer))
