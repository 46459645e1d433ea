"""How an arm is scored: by checked answers, by letters, or by the likelihood of given answers. No judge."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trimtab.bench.tasks import BATCH, PLAIN, PROMPT, ArmResult, ItemSteerings, Measure
from trimtab.engines.doses import DoseWarning
from trimtab.engines.request import AnsweredPrompt, Choice
from trimtab.evaluate.ab import ABItem, matching_share
from trimtab.evaluate.constraints import on_topic
from trimtab.evaluate.fluency import fluencies
from trimtab.evaluate.lora import original_weights
from trimtab.text.letters import letter_question_from_prompt, question_prompt

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.text.chat import Prompt

TOGETHER = 8
"""The number of answers per batch; the logits of a batch are in memory together."""
HIGHEST = 1e6
"""The cap on perplexities; NaN and higher values count as this."""


def by_answers(
    prompts: Mapping[str, Sequence[Prompt]],
    score: Callable[[int, str, bool], float],
    tokens: int,
    queries: Sequence[str] = (),
) -> Measure:
    """A measure that generates answers and checks them.

    Args:
        prompts: Each arm's prompts, one per item.
        score: `score(i, answer, cut)`: the score of the answer to item i.
        tokens: The maximum number of tokens of an answer.
        queries: The questions, for checking whether the answer is on topic.
    """
    context = prompts.get(PROMPT, prompts[PLAIN])

    def measure(lm: LM, arm: str, runs: Sequence[ItemSteerings], options: Mapping[str, Any]) -> list[ArmResult]:
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
        # a perplexity is always that of the original model
        with original_weights(lm):
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
            results.append(ArmResult(scores, beside, tuple(texts)))
        return results

    return measure


def by_letters(items: Sequence[ABItem], systems: Mapping[str, str | None]) -> Measure:
    """A measure of the matching letter's share of both letters' probability, and the mass of both.

    `systems` has each arm's system message.
    """

    def measure(lm: LM, arm: str, runs: Sequence[ItemSteerings], _options: Mapping[str, Any]) -> list[ArmResult]:
        choices = [letters_of(lm, item, systems[arm]) for item in items]
        return measure_letters(lm, choices, runs)

    return measure


def letters_of(lm: LM, item: ABItem, system: str | None = None) -> Choice:
    """A question up to the bracket, with the matching letter and the other one as the choices."""
    question = letter_question_from_prompt(
        lm.tokenizer, question_prompt(lm.tokenizer, item.question, system), (item.matching, item.other)
    )
    return Choice(question.ids, len(question.prompt), (question.letters[item.matching], question.letters[item.other]))


def measure_letters(lm: LM, choices: Sequence[Choice], runs: Sequence[ItemSteerings]) -> list[ArmResult]:
    """The measures of each run. A question's rows are adjacent, so that their shared prefix is computed once."""
    rows = [(i, n) for i in range(len(choices)) for n in range(len(runs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoseWarning)
        results = lm.next_logprobs([choices[i] for i, _ in rows], [runs[n][i] for i, n in rows], batch_size=BATCH)
    by_row = {row: token.logprobs for row, token in zip(rows, results, strict=True)}
    measured = []
    for n in range(len(runs)):
        mine = [by_row[i, n] for i in range(len(choices))]
        mass = tuple(math.exp(matching) + math.exp(other) for matching, other in mine)
        measured.append(ArmResult(tuple(matching_share(matching, other) for matching, other in mine), {"mass": mass}))
    return measured


def by_leads(answers: Sequence[tuple[Mapping[str, AnsweredPrompt], Mapping[str, AnsweredPrompt]]]) -> Measure:
    """A measure of how much likelier the wanted answer is than the other, in nats per token, teacher-forced.

    `answers[i]` are item i's wanted answer and the other one, each after the prompt of every arm.
    """

    def measure(lm: LM, arm: str, runs: Sequence[ItemSteerings], _options: Mapping[str, Any]) -> list[ArmResult]:
        measured = []
        for run in runs:
            wanted = likelihoods(lm, [positive[arm] for positive, _ in answers], run)
            other = likelihoods(lm, [negative[arm] for _, negative in answers], run)
            leads = tuple(a - b for a, b in zip(wanted, other, strict=True))
            measured.append(ArmResult(leads, {"wanted": tuple(wanted)}))
        return measured

    return measure


def likelihoods(lm: LM, texts: Sequence[AnsweredPrompt], run: ItemSteerings) -> list[float]:
    """The mean log-probability of each answer's tokens."""
    values = []
    for start in range(0, len(texts), TOGETHER):
        part = slice(start, start + TOGETHER)
        for text, logits in zip(texts[part], lm.answer_logits(texts[part], list(run[part])), strict=True):
            ids = torch.tensor(text.answer)[:, None]
            value = float(logits.float().log_softmax(-1).gather(-1, ids).mean())
            values.append(value if math.isfinite(value) else -math.log(HIGHEST))
    return values


def _capped(perplexity: float) -> float:
    return min(perplexity, HIGHEST)
