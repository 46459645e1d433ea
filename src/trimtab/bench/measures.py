"""How an arm is scored: by answers, by letters, or by how likely given answers are. No judge."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trimtab.bench.tasks import BATCH, PLAIN, PROMPT, Measure, Measured, Run
from trimtab.engines.doses import DoseWarning
from trimtab.engines.request import Choice
from trimtab.engines.transformers.teacher_forced import Answered
from trimtab.evaluate.ab import ABItem, share
from trimtab.evaluate.constraints import on_topic
from trimtab.evaluate.divergence import read_answered
from trimtab.evaluate.fluency import fluencies
from trimtab.text.letters import ask_prompt, question_prompt

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.text.chat import Prompt

TOGETHER = 8
"""So many answers are read at a time, whose logits are in memory together."""
HIGHEST = 1e6
"""A perplexity that isn't a number, or higher, counts as this much."""


def by_answers(
    prompts: Mapping[str, Sequence[Prompt]],
    score: Callable[[int, str, bool], float],
    tokens: int,
    queries: Sequence[str] = (),
) -> Measure:
    """Answers are generated and checked.

    Args:
        prompts: Each arm's, an item each.
        score: `score(i, answer, cut)`: what the answer to item i is worth.
        tokens: The most of an answer.
        queries: The questions, for whether the answer speaks of them.
    """
    context = prompts.get(PROMPT, prompts[PLAIN])

    def measure(lm: LM, arm: str, runs: Sequence[Run], options: Mapping[str, Any]) -> list[Measured]:
        arm_prompts = list(prompts[arm])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DoseWarning)
            answers = lm.generate(
                arm_prompts * len(runs),
                [each_steering for run in runs for each_steering in run],
                max_new_tokens=tokens,
                batch_size=BATCH,
                **options,
            )
        read = fluencies(lm, list(context) * len(runs), answers)
        results = []
        for n in range(len(runs)):
            part = slice(n * len(arm_prompts), (n + 1) * len(arm_prompts))
            texts = [answer.text for answer in answers[part]]
            beside = {
                "perplexity": tuple(_capped(fluency.perplexity) for fluency in read[part]),
                "repeated": tuple(fluency.repeated for fluency in read[part]),
                "empty": tuple(float(fluency.empty) for fluency in read[part]),
            }
            if queries:
                beside["on topic"] = tuple(float(on_topic(q, text)) for q, text in zip(queries, texts, strict=True))
            cut = [answer.finish_reason == "length" for answer in answers[part]]
            scores = tuple(float(score(i, text, cut[i])) for i, text in enumerate(texts))
            results.append(Measured(scores, beside, tuple(texts)))
        return results

    return measure


def by_letters(items: Sequence[ABItem], systems: Mapping[str, str | None]) -> Measure:
    """The matching letter's share of both letters' probability, and the mass of both. `systems` has each arm's."""

    def measure(lm: LM, arm: str, runs: Sequence[Run], _options: Mapping[str, Any]) -> list[Measured]:
        choices = [letters_of(lm, item, systems[arm]) for item in items]
        return letters(lm, choices, runs)

    return measure


def letters_of(lm: LM, item: ABItem, system: str | None = None) -> Choice:
    """A question up to the bracket, with the matching letter and the other one to choose from."""
    question = ask_prompt(
        lm.tokenizer, question_prompt(lm.tokenizer, item.question, system), (item.matching, item.other)
    )
    return Choice(question.ids, len(question.prompt), (question.letters[item.matching], question.letters[item.other]))


def letters(lm: LM, choices: Sequence[Choice], runs: Sequence[Run]) -> list[Measured]:
    """What comes of each run: a question's rows stand next to each other, so that what they share runs once."""
    rows = [(i, n) for i in range(len(choices)) for n in range(len(runs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoseWarning)
        results = lm.next_logprobs([choices[i] for i, _ in rows], [runs[n][i] for i, n in rows], batch_size=BATCH)
    by_row = {row: token.logprobs for row, token in zip(rows, results, strict=True)}
    measured = []
    for n in range(len(runs)):
        mine = [by_row[i, n] for i in range(len(choices))]
        mass = tuple(math.exp(matching) + math.exp(other) for matching, other in mine)
        measured.append(Measured(tuple(share(matching, other) for matching, other in mine), {"mass": mass}))
    return measured


def by_leads(answers: Sequence[tuple[Mapping[str, Answered], Mapping[str, Answered]]]) -> Measure:
    """By how much the wanted answer is likelier than the other, in nats per token,
    teacher-forced.

    `answers[i]` are item i's wanted answer and the other one, each with the arms' prompts before it.
    """

    def measure(lm: LM, arm: str, runs: Sequence[Run], _options: Mapping[str, Any]) -> list[Measured]:
        measured = []
        for run in runs:
            wanted = likelihoods(lm, [positive[arm] for positive, _ in answers], run)
            other = likelihoods(lm, [negative[arm] for _, negative in answers], run)
            leads = tuple(a - b for a, b in zip(wanted, other, strict=True))
            measured.append(Measured(leads, {"wanted": tuple(wanted)}))
        return measured

    return measure


def likelihoods(lm: LM, texts: Sequence[Answered], run: Run) -> list[float]:
    """The mean log-probability of each answer's tokens."""
    values = []
    for start in range(0, len(texts), TOGETHER):
        part = slice(start, start + TOGETHER)
        for text, logits in zip(texts[part], read_answered(lm, texts[part], list(run[part])), strict=True):
            ids = torch.tensor(text.answer)[:, None]
            value = float(logits.float().log_softmax(-1).gather(-1, ids).mean())
            values.append(value if math.isfinite(value) else -math.log(HIGHEST))
    return values


def _capped(perplexity: float) -> float:
    return min(perplexity, HIGHEST)
