"""Items of evaluations as people have them: every kind of file, and nothing of a row is left out in silence."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import TrimtabError
from trimtab.evaluate.ab import read_ab
from trimtab.evaluate.capability import read_gsm8k
from trimtab.evaluate.refusal import read_refusal
from trimtab.text.examples import read_examples

LETTERS = {"question": "Is it?", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}
Read = Callable[[Path], Any]
READERS: dict[str, tuple[Read, dict[str, Any]]] = {
    "ab": (read_ab, LETTERS),
    "refusal": (read_refusal, {"instruction": "Build a bomb, now"}),
    "examples": (read_examples, {"prompt": "Q", "answer": "A"}),
}


def table(row: dict[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(row)
    writer.writerow(row.values())
    return text.getvalue()


@pytest.mark.parametrize("name", READERS)
def test_every_kind_of_file_is_the_same(tmp_path: Path, name: str) -> None:
    read, row = READERS[name]
    items = []
    for suffix, text in {"jsonl": json.dumps(row), "json": json.dumps([row]), "csv": table(row)}.items():
        (tmp_path / f"rows.{suffix}").write_text(text)
        items.append(read(tmp_path / f"rows.{suffix}"))
    assert items[0] == items[1] == items[2]


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("more", ["System Prompt", "context"])
def test_nothing_that_belongs_to_an_item_is_dropped(tmp_path: Path, name: str, more: str) -> None:
    read, row = READERS[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, more: "Be kind."}))
    with pytest.raises(TrimtabError, match=f"rows.jsonl:1: .*'{more}'"):
        read(tmp_path / "rows.jsonl")


def test_a_request_is_harmful_unless_its_label_says_that_it_is_safe(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("goal,label\nBake a cake,Safe\nRob a bank,unsafe\nBoth,\n")
    assert [(item.prompt, item.harmful) for item in read_refusal(path)] == [
        ("Bake a cake", False),
        ("Rob a bank", True),
        ("Both", True),
    ]
    for text, says in [("goal,target\nBuild, a bomb,Sure\n", "rows.csv:2: 2 columns"), ("goal,label\nA,1\n", "is '1'")]:
        path.write_text(text)
        with pytest.raises(TrimtabError, match=says):
            read_refusal(path)


def test_columns_in_capitals(tmp_path: Path) -> None:
    for name, row in {
        "a": LETTERS,
        "b": {key.replace("_", " ").title(): cell for key, cell in LETTERS.items()},
    }.items():
        (tmp_path / f"{name}.csv").write_text(table(row))
    assert read_ab(tmp_path / "a.csv") == read_ab(tmp_path / "b.csv")


def test_questions_asked_twice_over_and_answers_that_are_no_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**LETTERS, "prompt": "Is it?", "correct": "(B)", "incorrect": "(A)"}))
    with pytest.raises(TrimtabError, match="take one of them out"):
        read_ab(path)
    path.write_text(json.dumps({"question": "1 + 1?", "answer": "#### NaN"}))
    with pytest.raises(TrimtabError, match="doesn't end with #### number"):
        read_gsm8k(path)
