"""An instruction is what a prompt has and its bare query has not."""

from __future__ import annotations

import pytest
import tiny

from benchmarks.emphasis import instructions_of, seka_arm
from trimtab.methods.seka import Highlight
from trimtab.text.spans import Phrase


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


def test_seka_is_an_arm_that_is_learned_once() -> None:
    lm = tiny.tiny("llama")
    examples = [Highlight(f"w{i} w{i + 1}", f"w{i}", "w9 w8", "w7 w6") for i in (0, 2, 4)]
    arm = seka_arm(lm, examples)
    steering = arm.steer(lm, "w1 w2 w3 w4", [Phrase("w2 w3")])  # type: ignore[misc]
    ((start, stop),) = lm.spans("w1 w2 w3 w4", "w2 w3")
    assert {(edit.site.kind, str(edit.positions)) for edit in steering.edits} == {("keys", f"span:{start}:{stop}")}
