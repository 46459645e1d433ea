"""Each example runs as its first lines say, and shows what it is about."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = [pytest.mark.real, pytest.mark.slow]


def run(name: str) -> str:
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        cwd=EXAMPLES.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_a_persona_shows_where_the_sweep_says() -> None:
    shown = run("persona")
    unsteered = int(re.findall(r"unsteered: (\d+)%", shown)[0])
    assert max(map(int, re.findall(r"layer \d+, .*?: (\d+)%", shown))) > unsteered
    answers = re.findall(r"unsteered: (.*)\n  cheerful: +(.*)", shown)
    assert len(answers) == 3
    assert all(plain != steered for plain, steered in answers)


@pytest.mark.long
def test_a_format_is_strengthened() -> None:
    counts = [
        (int(plain), int(steered))
        for plain, steered in re.findall(r"(\d+) bullet points unsteered, (\d+)", run("format"))
    ]
    assert len(counts) == 4
    assert all(steered > plain for plain, steered in counts)


@pytest.mark.long
def test_a_gate_opens_for_cooking_alone() -> None:
    shown = run("gate")
    assert shown.count("(dose 0.") == 2
    assert shown.count("(the gate stays shut)") == 2
    for question, plain, steered in re.findall(r"\n(.*\?) \(.*\n  unsteered: (.*)\n  steered: +(.*)", shown):
        assert (plain == steered) == ("swim" in question or "black hole" in question)


@pytest.mark.long
def test_a_server_answers_steered() -> None:
    pytest.importorskip("openai", reason="the example asks with OpenAI's client")
    pytest.importorskip("fastapi", reason="the server needs trimtab[serve]")
    unsteered, steered = re.findall(r"strength \d: (.*)", run("server"))
    assert unsteered
    assert steered
    assert unsteered != steered


def test_the_data_are_twenty_each() -> None:
    import json

    for name in ("cheerful", "truthful"):
        rows = [json.loads(line) for line in (EXAMPLES / "data" / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == 20
        assert all(set(row) == {"prompt", "positive", "negative"} for row in rows)
    for name in ("cooking", "other", "harmful", "harmless"):
        lines = (EXAMPLES / "data" / f"{name}.txt").read_text().splitlines()
        assert len(lines) == len(set(lines)) == 20
