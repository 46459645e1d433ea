"""A model's answers to the same questions for and against an idea, filtered to those that show the difference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trimtab.engines.transformers.forced import PromptAnswer
from trimtab.errors import TrimtabError
from trimtab.learn.own_answers import Lesson, logprobs
from trimtab.making.idea import Idea
from trimtab.text.chat import has_template, render_messages
from trimtab.text.repetition import REPEATED_LIMIT, repeated_share

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.text.chat import Prompt

BATCH = 128
LEAST = 8
"""The minimum number of answers to learn from, on each side."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Answer:
    """An answer, and the prompts for it, as token ids.

    `own` has the system prompt that it was written under, `other` that of the other side, `bare` none. If the model
    wrote it, `own_likelihood` and `other_likelihood` are the mean log-probabilities of its tokens under these prompts.
    """

    question: str
    own: tuple[int, ...]
    other: tuple[int, ...]
    bare: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    own_likelihood: float | None = None
    other_likelihood: float | None = None


@dataclass(frozen=True)
class Contrasts:
    """Answers for and against, filtered to those that are fit to learn from; `asked` counts all of them."""

    positive: tuple[Answer, ...]
    negative: tuple[Answer, ...]
    asked: int

    def for_questions(self, questions: Collection[str]) -> Contrasts:
        """The answers to some of the questions."""
        selected = set(questions)
        positive, negative = (
            tuple(answer for answer in side if answer.question in selected) for side in (self.positive, self.negative)
        )
        return Contrasts(positive, negative, self.asked)

    @property
    def questions(self) -> list[str]:
        """The questions that have answers on both sides, in order."""
        both = {answer.question for answer in self.negative}
        return list(dict.fromkeys(answer.question for answer in self.positive if answer.question in both))

    @property
    def training_examples(self) -> list[Lesson]:
        """The positive answers, for distilling."""
        return [
            Lesson(answer.question, 0, answer.own, answer.bare, answer.ids, answer.text) for answer in self.positive
        ]


@dataclass(frozen=True)
class PromptedQuestion:
    """A question to be answered (`wanted` or not) under its own prompt, with the other side's prompt and a bare one."""

    wanted: bool
    question: str
    own: Prompt
    other: Prompt
    bare: Prompt


def contrasts(
    lm: LM, idea: Idea, questions: Sequence[str], prompts: int, tokens: int, progress: Progress | None = None
) -> Contrasts:
    """The model's own answers for and against the idea.

    Each question is answered under `prompts` of the system prompts, in rotation.

    Args:
        lm: The model.
        idea: What is wanted.
        questions: The questions.
        prompts: The number of system prompts of each side that each question is answered under.
        tokens: The maximum length of an answer, in tokens.
        progress: Called with the number of answers that are done, and their total.
    """
    supports_system = supports_system_prompt(lm)
    rows: list[PromptedQuestion] = []
    for n, question in enumerate(questions):
        for prompt_number in range(prompts):
            mine = idea.positive[(n * prompts + prompt_number) % len(idea.positive)]
            against = idea.negative[(n * prompts + prompt_number) % len(idea.negative)]
            both = [with_system_prompt(system, question, supports_system) for system in (mine, against)]
            rows += [
                PromptedQuestion(True, question, both[0], both[1], question),
                PromptedQuestion(False, question, both[1], both[0], question),
            ]
    return generate_contrasts(lm, rows, tokens, progress)


def generate_contrasts(
    lm: LM, rows: Sequence[PromptedQuestion], tokens: int, progress: Progress | None = None
) -> Contrasts:
    """The model's own answers, filtered to those that show the difference.

    An answer counts if it isn't repetitive and is more likely under its own prompt than under the other side's (Chen et
    al., arXiv 2507.21509, section 2.2, use a judge instead).

    Args:
        lm: The model.
        rows: The questions with their prompts.
        tokens: The maximum length of an answer, in tokens.
        progress: Called with the number of answers that are done, and their total.
    """
    prompts = [row.own for row in rows]
    answers = lm.generate(prompts, max_new_tokens=tokens, batch_size=BATCH, logprobs=True, progress=progress)
    sides: dict[bool, list[Answer]] = {True: [], False: []}
    for row, answer in zip(rows, answers, strict=True):
        if answer.text.strip() and repeated_share(answer.text) <= REPEATED_LIMIT:
            own, other, bare = (tuple(lm.encode(prompt)) for prompt in (row.own, row.other, row.bare))
            ids, values = tuple(answer.token_ids), answer.logprobs
            assert values is not None  # they were asked for
            likelihood = sum(values) / len(values)
            sides[row.wanted].append(Answer(row.question, own, other, bare, ids, answer.text, likelihood))
    kept = {wanted: _distinguishable(lm, answers) for wanted, answers in sides.items()}
    return Contrasts(tuple(kept[True]), tuple(kept[False]), len(rows))


def check_enough(answers: Contrasts, name: str, least: int = LEAST) -> None:
    """Raises `TrimtabError` if too few answers show the difference."""
    if min(len(answers.positive), len(answers.negative), len(answers.questions)) < least:
        raise TrimtabError(
            f"the model's answers for and against {name!r} barely differ: of {answers.asked},"
            f" {len(answers.positive)} and {len(answers.negative)} do, and {least} of each are needed. Use clearer"
            " words, name an opposite, or try a larger model"
        )


def supports_system_prompt(lm: LM) -> bool:
    """Whether the chat template supports system prompts and doesn't drop them."""
    if not has_template(lm.tokenizer):
        return False
    try:
        brief, long = (
            render_messages(lm.tokenizer, [{"role": "system", "content": said}, {"role": "user", "content": "Hello"}])
            for said in ("Be brief.", "Be long.")
        )
    except TrimtabError:
        return False
    return brief != long


def with_system_prompt(system: str, question: str, supports_system: bool) -> Prompt:
    """The question under a system prompt; if the template doesn't support one, it is put before the question."""
    if not supports_system:
        return f"{system}\n\n{question}"
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def _distinguishable(lm: LM, answers: Sequence[Answer]) -> list[Answer]:
    """The answers that are more likely under their own prompt than under the other one."""
    values = logprobs(lm, [PromptAnswer(answer.other, answer.ids) for answer in answers])
    kept = []
    for answer, there in zip(answers, values, strict=True):
        assert answer.own_likelihood is not None  # the model has just written it
        under_other = float(there.double().mean())
        if answer.own_likelihood > under_other:
            kept.append(replace(answer, other_likelihood=under_other))
    return kept
