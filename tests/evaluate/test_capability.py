"""Knowledge and sums: what an answer comes to, and the sets' own answers."""

from __future__ import annotations

import json
import os
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest

from trimtab import TrimtabError
from trimtab.evaluate.ab import read_ab
from trimtab.evaluate.capability import (
    ANSWER_INSTRUCTION,
    MathItem,
    final_number,
    macro_average,
    math_requests,
    math_scorer,
    read_gsm8k,
)
from trimtab.evaluate.records import Record

DATA = Path(os.environ.get("TRIMTAB_DATA") or Path(__file__).parents[3] / "shared" / "data")
data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the data aren't in {DATA}; set TRIMTAB_DATA to their folder")


@pytest.mark.parametrize(
    ("text", "number", "marked"),
    [
        ("It is 3 + 4 = 7.\n#### 7", 7, True),
        ("#### 5\nNo: #### $1,234.50 dollars", "1234.5", True),
        ("#### -3", -3, True),
        ("She makes 3 * 6 = 18 dollars.", 18, False),
        ("So 12 apples, 30 in all #### ", 30, False),
        ("1,000,000", 1000000, False),
        ("none at all", None, False),
        ("", None, False),
    ],
)
def test_final_number(text: str, number: object, marked: bool) -> None:
    assert final_number(text) == (None if number is None else Decimal(str(number)), marked)


def test_scores() -> None:
    items = [MathItem("1", "How many?", Decimal("18")), MathItem("2", "And now?", Decimal("2.5"))]
    requests = math_requests(items, {"a": None})
    assert [request.prompt for request in requests] == [
        "How many?" + ANSWER_INSTRUCTION,
        "And now?" + ANSWER_INSTRUCTION,
    ]
    score = math_scorer(items)
    for text, expected in (("#### 18.0", (1, 1)), ("18", (1, 0)), ("#### 19", (0, 1)), ("?", (0, 0))):
        scores = score(requests[0], SimpleNamespace(text=text))  # type: ignore[arg-type]
        assert (scores["correct"], scores["marked"]) == expected
    assert score(requests[1], SimpleNamespace(text="2.50"))["correct"] == 1  # type: ignore[arg-type]


def test_the_average_is_over_categories() -> None:
    values = {"a/1": 1.0, "a/2": 0.0, "a/3": 0.0, "b/4": 1.0}
    records = [Record("x", item, "", "", 1, "scored", scores={"matching": value}) for item, value in values.items()]
    assert macro_average(records, "matching") == {"x": pytest.approx((1 / 3 + 1) / 2)}


@pytest.mark.parametrize("text", ["x\n", "[]\n", '{"question": "Q", "answer": "none"}\n', "\n"])
def test_bad_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "g.jsonl"
    path.write_text(text)
    with pytest.raises(TrimtabError, match=str(path)):
        read_gsm8k(path)


@data
def test_the_sets_at_hand() -> None:
    sums = read_gsm8k(DATA / "gsm8k" / "test.jsonl")
    assert len(sums) == 1319
    assert sums[0].answer == 18
    rows = [json.loads(line) for line in (DATA / "gsm8k" / "test.jsonl").read_text().splitlines()]
    assert all(final_number(row["answer"]) == (item.answer, True) for row, item in zip(rows, sums, strict=True))
    mmlu, _ = read_ab(DATA / "mmlu" / "mmlu.json")
    assert len(mmlu) == 570
    assert len({item.category for item in mmlu}) == 57
    some, _ = read_ab(DATA / "mmlu" / "mmlu.json", limit=57)
    assert len({item.category for item in some}) == 57
    assert len(read_ab(DATA / "truthfulqa" / "truthful_qa_ab.json")[0]) == 817
