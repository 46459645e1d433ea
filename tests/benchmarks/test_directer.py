"""The naive form that DIRECTER is timed against decodes the same tokens, and the prompts' suffixes are instructions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from benchmarks.directer import PROMPTS, WITHOUT, EmphasizedPrompt, clean_suffixes, naive
from trimtab.decoding.rejection import Rejection

ROWS = [
    ("Write a poem. No commas!", "Write a poem.", "No commas!"),
    (
        "Write a poem about it, in capitals.",
        "Write a poem about it.",
        None,
    ),  # what is left isn't a sentence's beginning
    ("In capitals, please: write a poem.", "Write a poem.", None),
    ("What is rye?\nAnswer in two paragraphs. Use no bold.", "What is rye?", "Answer in two paragraphs. Use no bold."),
    ("Sing.", "Sing.", None),
]


def test_clean_suffixes(tmp_path: Path) -> None:
    (tmp_path / "ifeval").mkdir()
    for path, name, column in ((PROMPTS, "prompt", 0), (WITHOUT, "prompt_without_instruction", 1)):
        rows = [json.dumps({"key": i, name: row[column]}) for i, row in enumerate(ROWS)]
        (tmp_path / path).write_text("\n".join(rows) + "\n")
    expected = [EmphasizedPrompt(prompt, instruction) for prompt, _, instruction in ROWS if instruction]
    assert clean_suffixes(tmp_path) == expected


@pytest.mark.slow
def test_the_naive_form_gives_the_same_tokens() -> None:
    lm = tiny.tiny("llama", seed=2)
    for seed in range(4):
        text = tiny.prompt(seed, 11)
        emphasized = EmphasizedPrompt(text, " ".join(text.split()[6:9]))
        (answer,) = lm.generate(text, emphasize=emphasized.instruction, rejection=Rejection(), max_new_tokens=10)
        assert naive(lm, emphasized, 10)[0] == list(answer.token_ids)
