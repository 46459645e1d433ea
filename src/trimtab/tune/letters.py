"""Tuning on multiple-choice questions: scored by the probability of the matching letter, one forward pass per question.

Rimsky et al. (2312.06681, section 4.1) read p(matching) / (p(matching) + p(other)) at the token after "(".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.engines.contract import check_length
from trimtab.engines.request import Choice, NextToken
from trimtab.errors import TrimtabError
from trimtab.evaluate.ab import matching_share
from trimtab.keywords import keywords
from trimtab.steering import Steering
from trimtab.text.answers import side_question
from trimtab.text.letters import letter_of
from trimtab.text.pairs import Pair, Pairs, as_pairs, sides
from trimtab.tune.candidates import Candidate
from trimtab.tune.halving import Rung
from trimtab.tune.meter import Outcome, Progress
from trimtab.tune.tune import BATCH_SIZE, HELD_OUT, MARGIN, OnRound, Tuned, search

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM


@keywords
def tune_letters(
    lm: LM,
    candidates: Sequence[Candidate],
    pairs: Pairs,
    *,
    batch_size: int = BATCH_SIZE,
    rungs: Sequence[Rung] | None = None,
    held_out: float = HELD_OUT,
    margin: float = MARGIN,
    seed: int = 0,
    budget_seconds: float | None = None,
    progress: Progress | None = None,
    on_round: OnRound | None = None,
    transfer: bool = False,
) -> Tuned:
    """`tune` for pairs of letters: a question's score is the matching letter's share of both letters' probability.

    No text is generated, so there is no quality guard: a strength found here may still break longer answers.

    Raises `TrimtabError` for pairs of another shape, letters that aren't single tokens, and as `tune` does.
    """
    pairs = as_pairs(pairs)
    choices = [_choice(lm, pair) for pair in pairs]

    def trial(steerings: Sequence[Steering | None], items: Sequence[int], progress: Progress) -> list[Outcome]:
        chosen = [choices[i] for i in items]
        results = lm.next_logprobs(chosen, steerings, batch_size=batch_size, transfer=transfer, progress=progress)
        return [_outcome(token) for token in results]

    return search(
        candidates,
        [pair.prompt for pair in pairs],
        trial,
        guard=None,
        rows=batch_size,
        rungs=rungs,
        held_out=held_out,
        margin=margin,
        seed=seed,
        budget_seconds=budget_seconds,
        progress=progress,
        on_round=on_round,
    )


def check_one_question(pairs: Sequence[Pair]) -> None:
    """Raises `TrimtabError` for a pair whose sides have different system prompts, since a question has only one."""
    if any(pair.positive_system != pair.negative_system for pair in pairs):
        raise TrimtabError(
            "a question is asked under one system prompt, but the sides of a pair here have different ones"
        )


def _choice(lm: LM, pair: Pair) -> Choice:
    """The question up to the bracket, with the matching letter and the other one as the choices."""
    if pair.shape != "letters":
        raise TrimtabError(f"letters are scored on multiple-choice pairs, these are pairs of {pair.shape}")
    check_one_question([pair])
    first, second = sides(pair)
    matching, other = letter_of(first.answer), letter_of(second.answer)
    question = side_question(lm.tokenizer, first, (matching, other))
    check_length(lm.layout, len(question.ids), "a question")
    return Choice(question.ids, len(question.prompt), (question.letters[matching], question.letters[other]))


def _outcome(token: NextToken) -> Outcome:
    return Outcome(score=matching_share(*token.logprobs), dose=token.applied.dose_if_measured, tokens=1)
