"""A teacher's sharpened next-token distributions, stored as their top tokens, and the divergence from them.

A small model follows its prompt with little confidence, and a student learns that too: on the default model, 15 of 32
answers had the required bullet points with the original distributions, and 21 with a temperature of 0.25.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.engines.transformers.forced import PromptAnswer, TeacherForcing, group_by_pass
from trimtab.learn.own_answers import Lesson, help_changes, helped_token_count

TOP = 64
MIN_REST = 1e-6
TEMPERATURE = 0.25
"""The temperature of the teacher's distributions; 1 doesn't change them, and near 0 only the likeliest token counts."""


@dataclass(frozen=True)
class Targets:
    """The teacher's `TOP` likeliest tokens at each token of an answer: `ids` and `logprobs`, `[answer tokens, TOP]`.

    The log-probabilities are those at `TEMPERATURE`.
    """

    ids: Tensor
    logprobs: Tensor


@torch.no_grad()
def soft_targets(
    run: TeacherForcing, lessons: Sequence[Lesson], progress: Callable[[int, int], None] | None = None
) -> list[Targets]:
    """The teacher's distributions at each token of each lesson: with its prompt, and with the lesson's help if any."""
    unhelped_texts = [PromptAnswer(lesson.instructed, lesson.answer) for lesson in lessons]
    targets: list[Targets] = []
    for numbers in group_by_pass(run.model, unhelped_texts):
        targets += [_likeliest(logits) for logits in run.logits([unhelped_texts[i] for i in numbers], {})]
        if progress is not None:
            progress(len(targets), len(lessons))
    for help_ in dict.fromkeys(lesson.help for lesson in lessons if lesson.help is not None):
        helped_indices = [i for i, lesson in enumerate(lessons) if lesson.help == help_]
        texts = [
            PromptAnswer(lessons[i].instructed, lessons[i].answer[: helped_token_count(lessons[i])])
            for i in helped_indices
        ]
        for numbers in group_by_pass(run.model, texts):
            logits = run.logits([texts[n] for n in numbers], help_changes(help_))
            for n, row in zip(numbers, logits, strict=True):
                opening, previous_targets = _likeliest(row), targets[helped_indices[n]]
                targets[helped_indices[n]] = Targets(
                    torch.cat([opening.ids, previous_targets.ids[len(opening.ids) :]]),
                    torch.cat([opening.logprobs, previous_targets.logprobs[len(opening.ids) :]]),
                )
    return targets


def _likeliest(logits: Tensor) -> Targets:
    top = (logits / TEMPERATURE).log_softmax(-1).topk(min(TOP, logits.shape[-1]), -1)
    return Targets(top.indices, top.values)


def divergence(logits: Tensor, targets: Targets) -> Tensor:
    """KL(teacher || student) at each token, `[answer tokens]`, in nats.

    All tokens outside the teacher's top tokens count as one token, so the result is a lower bound of the exact
    divergence.

    Args:
        logits: The student's logits, `[answer tokens, vocabulary]`.
        targets: The teacher's distributions.
    """
    student = logits.log_softmax(-1).gather(-1, targets.ids)
    teacher = targets.logprobs
    shares = teacher.exp()
    teacher_rest = (1 - shares.sum(-1)).clamp(min=MIN_REST)
    student_rest = (1 - student.exp().sum(-1)).clamp(min=MIN_REST)
    return (shares * (teacher - student)).sum(-1) + teacher_rest * (teacher_rest.log() - student_rest.log())
