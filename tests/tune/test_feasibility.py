"""What is said before a search that can't end in a verdict."""

from __future__ import annotations

import pytest

from trimtab.tune.feasibility import MIN_HELD_OUT, budget_warning, held_out_warning
from trimtab.tune.halving import Rung


def test_so_few_prompts_that_even_winning_all_proves_nothing():
    assert 0.5**MIN_HELD_OUT < 0.05 < 0.5 ** (MIN_HELD_OUT - 1)  # the sign test
    assert held_out_warning(MIN_HELD_OUT) is None
    assert held_out_warning(4).startswith("the final test has 4 prompts, ")
    assert held_out_warning(1).startswith("the final test has 1 prompt, ")


@pytest.mark.parametrize(
    ("budget", "pays"),
    [
        (None, None),
        (10 * (6 * 9 + 2 * 4), None),
        (10 * (6 * 9 + 2 * 4) - 1, 5),
        (10 * (9 + 8), 1),
        (10 * (9 + 8) - 1, None),
    ],
)
def test_so_few_tokens_that_the_first_round_ends_early(budget, pays):
    message = budget_warning(8, [Rung(6, 4), Rung(12, 2)], 4, 10, budget)
    assert message is None if pays is None else f"may cover only {pays} of the 6 prompts" in message
    assert message is None or "give 620" in message
