"""Which instruction each item has, and what becomes of those for which nothing can be learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import tiny

from benchmarks.words import length_items
from benchmarks.words_learned import ONCE, TWICE, Fit, answers, instruction_of, learned, rows
from trimtab.evaluate.ifeval import IFEvalItem

HOW = Fit("closed", 8, 8)


def item(name: str, kind: str, **arguments: Any) -> IFEvalItem:
    return IFEvalItem(name, name, f"w10 w11 w12 {name}", (kind,), (arguments,), "w10 w11 w12")


def test_items_with_the_same_word_or_number_share_a_steering() -> None:
    (short,) = length_items(["w10"], 2)
    assert instruction_of(short) == ("length_constraints:number_sentences", 2)
    assert instruction_of(item("a", "keywords:existence", keywords=["sea"])) == ("keywords:existence", "sea")
    assert instruction_of(item("a", "keywords:forbidden_words", forbidden_words=["sea"]))[1] == "sea"


def test_all_arms_answer_and_what_cannot_be_learned_counts_as_unsteered(tmp_path: Path) -> None:
    lm = tiny.tiny("llama")
    items = [item(f"w{n}", "keywords:existence", keywords=[word]) for n, word in ((20, "w70"), (21, "w70"), (22, "é"))]
    steerings = learned(lm, items, tmp_path, "logit", "logit", HOW)
    assert steerings["w20"] is not None
    assert steerings["w20"] == steerings["w21"]
    assert steerings["w22"] is None  # no token of this model
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    records = answers(lm, items, steerings, "without", tmp_path / "{}.jsonl", "logit", 6)
    arms = {(record.arm, record.item): record.answer for record in records}
    assert {arm for arm, _ in arms} == {"unsteered", "steered", "random", ONCE, TWICE}
    assert len(arms) == 15
    assert arms["steered", "w22"] == arms["random", "w22"] == arms["unsteered", "w22"]
    results = {(row.case, row.metric): row for row in rows(lm, "include", items, records, steerings)}
    assert results["include", "share of prompts steered"].value == pytest.approx(2 / 3)
    assert {f"gain over {other}" for other in ("unsteered", ONCE, TWICE)} <= {
        metric for case, metric in results if case == "include: steered"
    }
