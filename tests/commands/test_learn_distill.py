"""`trimtab learn distill`: what it takes, what it makes, and what it says when it can't."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab import TrimtabError, load
from trimtab.text.examples import read_examples

QUERIES = [f"What is the number {i}?" for i in range(10)]


@pytest.fixture
def checks(tmp_path: Path) -> Path:
    """A check of one's own that every answer passes."""
    path = tmp_path / "checks.py"
    path.write_text("def anything(answer, prompt):\n    return bool(answer) and 'number' in prompt\n")
    return path


@pytest.fixture
def common(tmp_path: Path, model: Path, checks: Path) -> list[Any]:
    queries = tmp_path / "queries.txt"
    queries.write_text("\n".join(QUERIES))
    return [
        *("--queries", queries, "--model", model, "--device", "cpu", "--check", f"{checks}:anything"),
        *("--tokens", 6, "--steps", 2, "--layers", "1,2"),
    ]


def test_every_kind_of_prompt(trimtab: Any, tmp_path: Path, common: list[Any]) -> None:
    text, shots = tmp_path / "style.txt", tmp_path / "shots.jsonl"
    text.write_text("Be brief.\n{query}\nBe quick.")
    shots.write_text(json.dumps({"prompt": "What is 1?", "answer": "ONE"}) + "\n")
    kinds: dict[str, list[Any]] = {
        "instruction": ["--instruction", "Whisper it.", "--times", 2],
        "text": ["--prompt-file", text],
        "examples": ["--examples", shots],
    }
    for name, options in kinds.items():
        out = tmp_path / f"{name}.safetensors"
        ran = trimtab("learn", "distill", *options, *common, "--out", out, "--json")
        assert ran.code == 0, ran.err
        learned = load(out)
        assert ran.json["edits"] == [str(edit) for edit in learned.edits]
        assert learned.layers == (1, 2)
        assert learned.card.method == ran.json["method"] == "distill"
        assert name in learned.card.options
        assert ran.json["measured"]["divergence_after"] <= ran.json["measured"]["divergence_before"]
        generated = trimtab(
            "generate", "--steer", out, *common[2:6], "--prompt", "Why?", "--max-new-tokens", 3, "--json"
        )
        assert generated.code == 0, generated.err


def test_what_is_said_to_a_person(trimtab: Any, tmp_path: Path, common: list[Any]) -> None:
    out = tmp_path / "out.safetensors"
    ran = trimtab("learn", "distill", "--instruction", "Whisper it.", "--fit", "closed", *common, "--out", out)
    assert ran.code == 0, ran.err
    assert "answers that follow the prompt: 10 of 10\n" in ran.out
    assert "divergence from the model with the prompt" in ran.out
    assert f"saved {out}" in " ".join(ran.out.split())
    assert "10 of 10 queries have an answer that follows the prompt" in ran.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "there is no prompt to learn from; give --instruction"),
        (["--instruction", " "], "--instruction is empty"),
        (["--system", ""], "--system is empty"),
        (["--prompt-file", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--pairs", "x.jsonl"], "(see trimtab learn distill --help)"),
        (["--instruction", "Whisper.", "--fit", "best"], "fits: gradient, closed, both"),
        (["--instruction", "Whisper.", "--steps", "0"], "steps"),
    ],
)
def test_what_cannot_be_is_said(
    trimtab: Any, tmp_path: Path, common: list[Any], options: list[str], words: str
) -> None:
    out = tmp_path / "out.safetensors"
    common = [part for i, part in enumerate(common) if "--steps" not in (part, common[i - 1])]
    ran = trimtab("learn", "distill", *options, *common, "--out", out)
    assert ran.code == 2
    assert words in " ".join(ran.err.split())
    assert not out.exists()


def test_too_few_queries_are_counted_before_the_model(trimtab: Any, tmp_path: Path) -> None:
    queries = tmp_path / "few.txt"
    queries.write_text("\n".join(QUERIES[:3]))
    options = ("--instruction", "Whisper.", "--queries", queries, "--model", "nowhere")
    ran = trimtab("learn", "distill", *options, "--out", tmp_path / "out.safetensors")
    assert ran.code == 2
    assert f"{queries}: 3 different queries" in ran.err


def test_too_few_answers_that_count(trimtab: Any, tmp_path: Path, common: list[Any], checks: Path) -> None:
    checks.write_text("def anything(answer):\n    return False\n")
    ran = trimtab("learn", "distill", "--instruction", "Whisper.", *common, "--out", tmp_path / "out.safetensors")
    assert (ran.code, ran.out) == (2, "")
    assert "0 of" in ran.err
    assert "answers written under this prompt follow it" in ran.err
    assert "more queries" in ran.err


def test_a_known_instruction_brings_its_check(trimtab: Any, tmp_path: Path, common: list[Any]) -> None:
    """A random model writes no JSON, and so nothing can be learned: without the check, anything might be."""
    out = tmp_path / "out.safetensors"
    at = common.index("--check")
    ran = trimtab("learn", "distill", "--instruction", "Answer in JSON.", *common[:at], *common[at + 2 :], "--out", out)
    assert ran.code == 2
    assert "0 of" in ran.err
    assert "answers written under this prompt follow it" in ran.err
    assert "recognized as detectable_format:json_format" in ran.err


def test_examples(tmp_path: Path) -> None:
    path = tmp_path / "shots.csv"
    path.write_text('prompt,answer\n"What is 1?",one\n"What is 2?",two\n')
    assert read_examples(path) == [("What is 1?", "one"), ("What is 2?", "two")]
    for text, words in (
        ("prompt,answer\nWhat?,\n", ":2: an example needs a prompt and an answer"),
        ("prompt,answer\n", "no ex"),
    ):
        path.write_text(text)
        with pytest.raises(TrimtabError, match=words):
            read_examples(path)
