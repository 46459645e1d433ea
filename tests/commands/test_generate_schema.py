"""`trimtab generate --json-schema`: answers are JSON, and a file that is none is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="grammars need trimtab[serve]")

CITY = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}


@pytest.fixture
def ask(trimtab: Any, model: Path) -> Any:
    options = ("--model", model, "--device", "cpu", "--prompt", "Why?", "--max-new-tokens", 60)
    return lambda *rest: trimtab("generate", *options, *rest)


def test_an_answer_by_a_schema(ask: Any, steering: Path, tmp_path: Path) -> None:
    (tmp_path / "city.json").write_text(json.dumps(CITY))
    ran = ask("--json-schema", tmp_path / "city.json", "--steer", f"{steering}:9", "--compare", "--json")
    assert ran.code == 0, ran.err
    (row,) = ran.json["answers"]
    for answer in (row, row["unsteered"]):
        assert answer["finish_reason"] == "stop"
        assert json.loads(answer["text"])["n"] in (1, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "isn't JSON"),
        ('{"type": "strin"}', "Invalid type: strin"),
        (None, "there is no file"),
        ("[]", "an object"),
    ],
)
def test_a_file_that_is_none(ask: Any, tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "city.json").write_text(text)
    ran = ask("--json-schema", tmp_path / "city.json")
    assert ran.code == 2
    assert said in " ".join(ran.err.split())
