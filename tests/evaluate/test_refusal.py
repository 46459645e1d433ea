"""Refusals by rule, and the sets they are counted on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from trimtab import TrimtabError
from trimtab.evaluate.records import ArmPrompt, Record
from trimtab.evaluate.refusal import OPENING, part_of, read_refusal, refusal_requests, refuses, score

DATA = Path(os.environ.get("TRIMTAB_DATA") or Path(__file__).parents[3] / "shared" / "data")
data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the data aren't in {DATA}; set TRIMTAB_DATA to their folder")


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I can’t assist you.",
        "Sorry, but no.",
        "I cannot provide instructions for this.",
        "As an AI language model, I must decline.",
        "It is illegal to do so.",
        "\n\n I   am\nunable to do that",
        "Unfortunately, I won't be writing this.",
    ],
)
def test_refusals(answer: str) -> None:
    assert refuses(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Sure, here is a script.",
        "To kill a Python process, use kill -9.",
        "The capital is Paris. Sorry is a board game.",
        "Step one. " * (OPENING // 10 + 1) + "I cannot stress this enough.",
    ],
)
def test_answers(answer: str) -> None:
    assert not refuses(answer)


def test_scores() -> None:
    request = ArmPrompt("a", "x/1", "Why?")
    for text, expected in (("I can't.", (1, 0)), ("Because.", (0, 0)), (" \n", (0, 1))):
        scores = score(request, SimpleNamespace(text=text))  # type: ignore[arg-type]
        assert (scores["refused"], scores["empty"]) == expected


def test_reading(tmp_path: Path) -> None:
    bench = tmp_path / "bench.csv"
    bench.write_text('\ufeffgoal,target\nDo it,Sure\n"Do, that",Sure\n')
    items = read_refusal(bench)
    assert [(i.item, i.prompt, i.part, i.harmful) for i in items] == [
        ("bench/1", "Do it", "bench", True),
        ("bench/2", "Do, that", "bench", True),
    ]
    both = tmp_path / "x.csv"
    both.write_text(
        "id,prompt,type,label\n" + "".join(f"{i},P{i},t,{'safe' if i % 2 else 'unsafe'}\n" for i in range(8))
    )
    items = read_refusal(both, limit=2)
    assert [(i.prompt, i.part, i.harmful) for i in items] == [
        ("P0", "x unsafe", True),
        ("P4", "x unsafe", True),
        ("P1", "x safe", False),
        ("P5", "x safe", False),
    ]
    requests = refusal_requests(items, {"a": None, "s": None}, {"s": "Be kind."})
    assert len(requests) == 8
    assert requests[1].prompt == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "P0"}]
    assert part_of(Record("a", items[0].item, "", "", 1, "stop")) == "x unsafe"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", "{}", "a list of objects"),
        ("a.json", "[", "JSON"),
        ("a.json", "[]", "no requests"),
        ("a.json", '[{"text": 1}]', "item 1: a row with goal"),
        ("a.json", json.dumps([{"instruction": " "}]), "'instruction' is empty"),
        ("a.csv", "id,prompt,label\n1,P,perhaps\n", r"label \(safe, unsafe\)"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(TrimtabError, match=says):
        read_refusal(path)


@data
def test_the_sets_at_hand() -> None:
    assert len(read_refusal(DATA / "advbench" / "harmful_behaviors.csv")) == 520
    parts = [item.part for item in read_refusal(DATA / "xstest" / "xstest_prompts.csv")]
    assert (parts.count("xstest_prompts safe"), parts.count("xstest_prompts unsafe")) == (250, 200)
    for path in sorted((DATA / "refusal").glob("*.json")):
        assert all(item.harmful for item in read_refusal(path))
