"""An instruction is what a prompt has and its bare query has not."""

from __future__ import annotations

import pytest

from benchmarks.emphasis import instructions_of


@pytest.mark.parametrize(
    ("prompt", "without", "expected"),
    [
        ("Write a poem. Do not use any commas.", "Write a poem.", ["Do not use any commas."]),
        ("Write a poem", "Write a poem.", []),
        ("Write a song with less than 10 lines for Ann.", "Write a song for Ann.", ["with less than 10 lines"]),
        (
            "Write with two titles here. Name a sea. Use no capital letters.",
            "Write. Name a sea.",
            ["with two titles here.", "Use no capital letters."],
        ),
        ("Say it in one line. A dog. Say it in one line.", "A dog.", []),  # which of the two can't be told
        ("Quite another thing to do here, please.", "What is the sea like in May?", []),
    ],
)
def test_the_pieces(prompt: str, without: str, expected: list[str]) -> None:
    assert instructions_of(prompt, without) == expected
