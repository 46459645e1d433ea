"""Whether a search can end in a verdict at all: known before it starts, since nothing in it can change that."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.evaluate.decision import LEVEL, fewest
from trimtab.tune.halving import Rung

ENOUGH = fewest()
"""So many held-out prompts, if all are won, are told from luck: 1 / 2**5 < 0.05 (the sign test), and 1 / 2**4 isn't."""


def too_few(held_out: int) -> str | None:
    """Why no interval around the last word can be trusted, or `None`.

    Args:
        held_out: How many prompts are kept for the last word.
    """
    if held_out >= ENOUGH:
        return None
    prompts = f"{held_out} prompt" if held_out == 1 else f"{held_out} prompts"
    return (
        f"the last word will be on {prompts}, and even if all of them are won that can't be told from luck"
        f" ({ENOUGH} are needed at {LEVEL:.0%}), so the answer will be not to steer: give more prompts"
    )


def too_poor(
    candidates: int, rungs: Sequence[Rung], held_out: int, tokens_each: int, budget_tokens: int | None
) -> str | None:
    """Why a budget of tokens can't tell the candidates apart, or `None`.

    Args:
        candidates: How many there are besides "don't steer".
        rungs: The rounds of the search.
        held_out: How many prompts are kept for the last word, which is paid for first.
        tokens_each: What an answer costs at most.
        budget_tokens: What may be generated in all; `None`: anything.
    """
    if budget_tokens is None:
        return None
    pays = (budget_tokens // tokens_each - 2 * held_out) // (candidates + 1)
    first = rungs[0].items
    if not 0 < pays < first:
        return None  # a budget that pays for none is refused by the search
    needed = ((candidates + 1) * first + 2 * held_out) * tokens_each
    return (
        f"the budget of {budget_tokens} tokens may pay for {pays} of the {first} prompts of the first round, on which"
        f" {candidates} candidates can hardly be told apart; give {needed}, or try fewer layers or strengths"
    )
