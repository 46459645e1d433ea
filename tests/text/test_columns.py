"""Data as people have it: under other names, in other formats, one statement a row; and nothing of it is dropped."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import TrimtabError
from trimtab.text.columns import ALIASES, Columns
from trimtab.text.pairs import KEYS, Pair, pairs_from_rows, pairs_from_text, read_pairs, row_of
from trimtab.text.statements import PairingWarning

ANSWER = Pair("Fine.", "Go.", "How are you?", "answers")
SIDES = {"positive": "Fine.", "negative": "Go."}
USER, REPLY = {"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}
OTHER = {"role": "assistant", "content": "Go."}


@pytest.mark.parametrize("name", ALIASES["prompt"])
def test_the_prompt_by_its_other_names(name: str) -> None:
    value: Any = "How are you?" if name != "messages" else [USER]
    (pair,) = pairs_from_rows([{name: value, **SIDES}])
    assert pair == Pair("Fine.", "Go.", value, "answers")


@pytest.mark.parametrize(("positive", "negative"), [("chosen", "rejected"), ("matching", "not_matching")])
def test_the_sides_by_their_other_names(positive: str, negative: str) -> None:
    assert pairs_from_rows([{"question": "How are you?", positive: "Fine.", negative: "Go."}]) == [ANSWER]
    assert pairs_from_rows([{positive: "Fine.", negative: "Go."}]) == [Pair("Fine.", "Go.")]


def test_preferences_whose_messages_repeat_the_prompt() -> None:
    row = {"chosen": [USER, REPLY], "rejected": [USER, OTHER]}
    expected = pairs_from_rows([row])
    assert expected[0].prompt == ""
    assert pairs_from_rows([{"prompt": "How are you?", **row}]) == expected
    assert pairs_from_rows([{"prompt": [USER], **row}]) == expected
    later = {side: [{"role": "user", "content": "Hi"}, REPLY, *row[side]] for side in row}
    assert pairs_from_rows([{"prompt": " How are you?\n", **later}]) == pairs_from_rows([later])
    with pytest.raises(TrimtabError, match="the messages of the positive side begin with 'user'"):
        pairs_from_rows([{"prompt": "Hello", **row}])


def test_an_empty_column_doesn_t_compete_for_the_prompt() -> None:
    assert pairs_from_rows([{"instruction": "How are you?", "input": " ", **SIDES}]) == [ANSWER]
    with pytest.raises(TrimtabError, match=r"'instruction' and 'input' could each be the prompt.*--ignore input"):
        pairs_from_rows([{"instruction": "How are you?", "input": "Hi", **SIDES}])
    assert pairs_from_rows([{"instruction": "How are you?", "input": "Hi", **SIDES}], ignore=["input"]) == [ANSWER]


KEYED = {"q": "How are you?", "a": "Fine.", "b": "Go."}


def test_columns_by_any_name() -> None:
    keys = {"prompt": "q", "positive": "a", "negative": "b"}
    assert pairs_from_rows([KEYED], keys=keys) == [ANSWER]
    swapped = pairs_from_rows(
        [{"prompt": "How are you?", **SIDES}], keys={"positive": "negative", "negative": "positive"}
    )
    assert swapped == [Pair("Go.", "Fine.", "How are you?", "answers")]
    letters = {"question": "q", "answer_matching_behavior": "y", "answer_not_matching_behavior": "n"}
    (pair,) = pairs_from_rows([{"q": "(A) or (B)?", "y": "(A)", "n": "(B)"}], keys=letters)
    assert pair.shape == "letters"


def test_what_is_said_on_the_command_line() -> None:
    columns = Columns.parse(KEYS, "positive=a, negative=b c", "d,e f")
    assert columns == Columns({"positive": "a", "negative": "b c"}, frozenset({"d", "e f"}))
    assert Columns.parse(KEYS, None, None) == Columns()
    for keys, ignore, said in [
        ("positive", None, "'positive'; write positive=COLUMN"),
        ("", None, "write positive=COLUMN"),
        ("positive=a,positive=b", None, "for 'positive' twice"),
        ("good=a", None, "no part of a pair is called 'good'; parts are prompt"),
        (None, "a,,b", "write COLUMN,COLUMN"),
    ]:
        with pytest.raises(TrimtabError, match=re.escape(said)):
            Columns.parse(KEYS, keys, ignore)
    with pytest.raises(TrimtabError, match="must be a list"):
        pairs_from_rows([SIDES], ignore="id")


def test_a_column_that_is_in_no_row() -> None:
    with pytest.raises(TrimtabError, match=r"pairs has no column 'c', which was given as 'positive'; .*'q', 'a', 'b'"):
        pairs_from_rows([KEYED], keys={"positive": "c", "negative": "b"})
    assert pairs_from_rows([{**SIDES, "prompt": "x", "s": "Be kind."}, {**SIDES, "prompt": "y"}], keys={"system": "s"})


@pytest.mark.parametrize(
    "more",
    [
        {"anchor": "Rain."},
        {"context": ["a"]},
        {"": "What?"},
        {"extra": {"a": 1}},
        {"metadata": {"Prompt": "Who?"}},
        {"winner": "a"},
    ],
)
def test_what_may_matter_is_never_dropped(more: dict[str, Any]) -> None:
    (name,) = more
    with pytest.raises(
        TrimtabError, match=f"{name!r} would be ignored, but may matter.*(--keys|a separate column).*--ignore"
    ):
        pairs_from_rows([{"prompt": "How are you?", **SIDES, **more}])
    assert pairs_from_rows([{"prompt": "How are you?", **SIDES, **more}], ignore=[name]) == [ANSWER]


@pytest.mark.parametrize(
    "more",
    [
        {"score": 0.5},
        {"score": "0.5"},
        {"": "17"},
        {"kept": True},
        {"kept": "False"},
        {"note": None},
        {"note": float("nan")},
        {"note": " "},
        {"note": []},
        {"embedding": [0.5, 1]},
        {"prompt_id": "a1"},
        {"Source": "here"},
        {"category": "greetings"},
        {"statement": "are you?"},
        {"answer": "Fine."},
    ],
)
def test_what_is_about_the_row_or_said_elsewhere_is_not_in_the_way(more: dict[str, Any]) -> None:
    assert pairs_from_rows([{"prompt": "How are you?", **SIDES, **more}]) == [ANSWER]


def test_cells_that_are_not_a_number() -> None:
    row = {"question": "How are you?", "matching": float("nan"), "not_matching": "Go."}
    with pytest.raises(TrimtabError, match=r"pairs\[0\]: 'matching' is NaN, an empty cell"):
        pairs_from_rows([row])
    for name in ("system", "prompt"):
        with pytest.raises(TrimtabError, match=f"'{name}' is NaN"):
            pairs_from_rows([{"prompt": "a", **SIDES, name: float("nan")}])


def test_an_unknown_row_says_how_to_name_its_columns() -> None:
    with pytest.raises(TrimtabError, match=r"its keys are q, a, b; if they have other names.*--keys positive=COLUMN"):
        pairs_from_rows([KEYED])
    with pytest.raises(TrimtabError, match="it has 'question', 'chosen' but not the rest"):
        pairs_from_rows([{"question": "q", "chosen": "a"}])


# ---- statements --------------------------------------------------------------------------------------------------


def labelled(*rows: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [dict(zip(("statement", "label", "prompt"), row, strict=False)) for row in rows]


def test_statements_in_the_order_they_come() -> None:
    rows = labelled(("a", 1), ("b", "False"), ("c", "true"), ("d", True), ("e", 0))
    with pytest.warns(
        PairingWarning, match="pairs: 2 pairs made of 5 labelled .*order they come; 1 without .* left out"
    ):
        assert pairs_from_rows(rows) == [Pair("a", "b"), Pair("c", "e")]


def test_statements_under_the_same_prompt() -> None:
    rows = labelled(("a", 1, "x"), ("b", 0, "y"), ("c", 0, "x"), ("d", 1, "y"))
    with pytest.warns(PairingWarning, match="2 pairs made of 4 .*under the same prompt$"):
        assert pairs_from_rows(rows) == [Pair("a", "c", "x", "answers"), Pair("d", "b", "y", "answers")]


@pytest.mark.filterwarnings("ignore::trimtab.text.statements.PairingWarning")
def test_statements_that_make_no_pairs() -> None:
    cases = [
        (labelled(("a", 1), ("b", 1)), "2 statements are true and 0 false"),
        (labelled(("a", 1, "x"), ("b", 0, "y")), "a pair is one of each of the same prompt"),
        (labelled(("a", 1), ("a", 0)), "'a' is labelled true and false"),
        (labelled(("a", "gloomy")), "pairs[0]: the label 'gloomy' is neither true nor false"),
        ([*labelled(("a", 1)), SIDES], "pairs[1]: labelled statements and pairs are in one file"),
    ]
    for rows, said in cases:
        with pytest.raises(TrimtabError, match=re.escape(said)):
            pairs_from_rows(rows)


# ---- formats -----------------------------------------------------------------------------------------------------

TABLES = {
    "tabs": ("p.tsv", "prompt\tpositive\tnegative\nHow are you?\tFine.\tGo.\n"),
    "semicolons": ("p.csv", "prompt;positive;negative\nHow are you?;Fine.;Go.\n"),
    "tabs in a .csv": ("p.csv", "prompt\tpositive\tnegative\nHow are you?\tFine.\tGo.\n"),
    "commas, and a semicolon in a name": ("p.csv", "id;,prompt,positive,negative\n1,How are you?,Fine.,Go.\n"),
    "an index, and columns without a name": ("p.csv", ",prompt,positive,negative,,\n0,How are you?,Fine.,Go.,,\n"),
    "columns": ("p.json", '{"prompt": ["How are you?"], "positive": ["Fine."], "negative": ["Go."]}'),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables(tmp_path: Path, case: str) -> None:
    name, text = TABLES[case]
    (tmp_path / name).write_text(text)
    assert read_pairs(tmp_path / name) == [ANSWER]


def test_tables_that_can_not_be_read(tmp_path: Path) -> None:
    for name, text, said in [
        ("p.csv", "positive,positive\na,b\n", "has 'positive' twice"),
        ("p.tsv", "positive\tnegative\na\n", "p.tsv:2: 2 columns expected"),
        ("p.json", '{"metadata": {}, "pairs": [1]}', "its lists are 'pairs': save one of them"),
        ("p.json", '{"positive": ["a", "b"], "negative": ["c"]}', "its lists are 'positive', 'negative'"),
        ("p.parquet", "no parquet", "as Parquet"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(TrimtabError, match=re.escape(said)):
            read_pairs(tmp_path / name)
    with pytest.raises(TrimtabError, match="there is no file"):
        read_pairs(tmp_path / "other.parquet")


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": [USER], "chosen": "Fine.", "rejected": "Go.", "score": 1.5}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert read_pairs(tmp_path / "p.parquet") == [Pair("Fine.", "Go.", [USER], "answers")]  # type: ignore[arg-type]
    parquet.write_table(arrow.Table.from_pylist([{"chosen": None, "rejected": "Go."}]), tmp_path / "p.parquet")
    with pytest.raises(TrimtabError, match=r"p\.parquet: row 1: 'chosen' is empty"):
        read_pairs(tmp_path / "p.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TrimtabError, match="pip install pyarrow"):
        read_pairs(tmp_path / "p.parquet")


# ---- text that was pasted ----------------------------------------------------------------------------------------


def test_pasted_text() -> None:
    row = {"question": "How are you?", "chosen": "Fine.", "rejected": "Go."}
    columns = json.dumps({name: [cell] for name, cell in row.items()}, indent=1)
    for text in (json.dumps([row]), json.dumps(row), columns, "question\tchosen\trejected\nHow are you?\tFine.\tGo.\n"):
        assert pairs_from_text(text) == [ANSWER]
    with pytest.raises(TrimtabError, match="pairs:2: 'chosen' is empty"):
        pairs_from_text(json.dumps(row) + "\n" + json.dumps({**row, "chosen": ""}))


def test_rows_of_pairs_are_read_as_the_same_pairs() -> None:
    pairs = [
        ANSWER,
        Pair("a", "b"),
        Pair("(A)", "(B)", "Is it?", "letters", "Be brief.", "Be brief."),
        Pair("a", "b", "", "prompts", "s"),
        Pair([USER, REPLY], [USER, OTHER], "", "answers"),  # type: ignore[arg-type]
        Pair("a", "b", [USER], "answers", None, "t"),  # type: ignore[arg-type]
    ]
    for pair in pairs:
        assert pairs_from_rows([row_of(pair)]) == [pair]
