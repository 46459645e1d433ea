"""Checks whether a search can reach a verdict at all: before it, and of a budget of time after its first answers."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.errors import TrimtabError
from trimtab.evaluate.decision import LEVEL, min_items_for_verdict
from trimtab.tune.halving import Rung

MIN_HELD_OUT = min_items_for_verdict()
"""The fewest held-out prompts that can beat chance, if all are won (sign test): 1 / 2**5 < 0.05, 1 / 2**4 isn't."""


class BudgetWarning(UserWarning):
    """A search's budget is too small for its candidates to be told apart."""


def held_out_warning(held_out: int) -> str | None:
    """Why too few held-out prompts make the final test pointless, or `None`.

    Args:
        held_out: The number of prompts kept for the final test.
    """
    if held_out >= MIN_HELD_OUT:
        return None
    prompts = f"{held_out} prompt" if held_out == 1 else f"{held_out} prompts"
    return (
        f"the final test has {prompts}, and even if all of them are won that can't be told from luck"
        f" ({MIN_HELD_OUT} are needed at {LEVEL:.0%}), so the answer will be not to steer: give more prompts"
    )


def budget_warning(
    candidates: int, rungs: Sequence[Rung], held_out: int, tokens_each: int, budget_tokens: int | None
) -> str | None:
    """Why a token budget can't distinguish the candidates, or `None`.

    Args:
        candidates: The number of candidates besides "don't steer".
        rungs: The rounds of the search.
        held_out: The number of prompts kept for the final test, which is paid for first.
        tokens_each: The maximum cost of an answer in tokens.
        budget_tokens: The maximum number of generated tokens in all; `None` for no limit.
    """
    if budget_tokens is None:
        return None
    pays = (budget_tokens // tokens_each - 2 * held_out) // (candidates + 1)
    first = rungs[0].items
    if not 0 < pays < first:
        return None  # a budget that pays for no prompt is an error, see `check_token_budget`
    needed = ((candidates + 1) * first + 2 * held_out) * tokens_each
    return (
        f"the budget of {budget_tokens} tokens may cover only {pays} of the {first} prompts of the first round, on"
        f" which {candidates} candidates can hardly be told apart; give {needed}, or try fewer layers or strengths"
    )


def check_token_budget(candidates: int, held_out: int, tokens_each: int, budget_tokens: int | None) -> None:
    """Raise `TrimtabError` if a token budget doesn't cover one prompt, and the final test.

    Args:
        candidates: The number of candidates besides "don't steer".
        held_out: The number of prompts kept for the final test.
        tokens_each: The maximum cost of an answer in tokens.
        budget_tokens: The maximum number of generated tokens in all; `None` for no limit.
    """
    needed = (candidates + 1 + 2 * held_out) * tokens_each
    if budget_tokens is not None and budget_tokens < needed:
        raise TrimtabError(
            f"a budget of {budget_tokens} tokens doesn't cover one prompt with {candidates} candidates and the"
            f" {held_out} held-out ones: {needed} are needed, at {tokens_each} per answer; give more, or try fewer"
            " candidates"
        )


def time_warning(
    candidates: int, rungs: Sequence[Rung], seconds_each: float, budget_seconds: float | None
) -> str | None:
    """Why a budget of time can't distinguish the candidates, or `None`.

    Args:
        candidates: The number of candidates besides "don't steer".
        rungs: The rounds of the search.
        seconds_each: The time that an answer takes.
        budget_seconds: The time for the search without its final test; `None` for no limit.
    """
    first = rungs[0].items
    needed = (candidates + 1) * first * seconds_each
    if budget_seconds is None or needed <= budget_seconds:
        return None
    covered = budget_seconds / needed
    return (
        f"at {seconds_each:.2g} s per answer, the budget of {budget_seconds / 60:.2g} minutes covers about"
        f" {covered:.0%} of the first round, {first} prompts, on which {candidates} candidates can hardly be told"
        f" apart; give {needed / 60:.2g} minutes or more, or try fewer layers or strengths"
    )
