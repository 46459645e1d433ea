"""Files of pairs as other programs write them: read as they are meant, or refused by place, reason and fix."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import TrimtabError
from trimtab.text.doubtful import DoubtfulPairsWarning
from trimtab.text.pairs import Pair, read_pairs
from trimtab.text.statements import PairingWarning

USER, YES, NO = (
    {"role": role, "content": text} for role, text in [("user", "Q"), ("assistant", "y"), ("assistant", "n")]
)
SYSTEM = {"role": "system", "content": "s"}
HUMAN, GPT, OTHER = ({"from": who, "value": text} for who, text in [("human", "Q"), ("gpt", "y"), ("gpt", "n")])
ROW = {"prompt": "Q", "positive": "y", "negative": "n"}
TABLE = "prompt,positive,negative\nQ,y,n\n"
PLAIN = Pair("y", "n", "Q", "answers")
SHORT = Pair([YES], [NO], [USER], "answers")  # type: ignore[arg-type]
WHOLE = Pair([USER, YES], [USER, NO], "", "answers")  # type: ignore[arg-type]

READ: dict[str, tuple[str, Any, Pair]] = {
    "columns in capitals, with spaces": ("p.jsonl", {" Prompt": "Q", "POSITIVE": "y", "Negative ": "n"}, PLAIN),
    "names of another case": (
        "p.jsonl",
        {"question": "Q", "answerMatchingBehavior": "(A)", "Answer-Not Matching_behavior": "(B)"},
        Pair("(A)", "(B)", "Q", "letters"),
    ),
    "answers in words where letters are usual": (
        "p.jsonl",
        {"question": "Q", "answer_matching_behavior": " y es", "answer_not_matching_behavior": " no"},
        Pair("y es", "no", "Q", "answers"),
    ),
    "a system prompt by its other name": (
        "p.jsonl",
        {"system_prompt": "s", **ROW},
        Pair("y", "n", "Q", "answers", "s", "s"),
    ),
    "a space behind each comma": ("p.csv", 'prompt, positive, negative\n"Q", "y", n\n', PLAIN),
    "Excel's line of the separator": ("p.csv", "sep=;\nprompt;positive;negative\nQ;y;n\n", PLAIN),
    "bars": ("p.csv", TABLE.replace(",", "|"), PLAIN),
    "commas in a .tsv": ("p.tsv", TABLE, PLAIN),
    "empty rows at the end": ("p.csv", TABLE + ",,\n\n , ,\n", PLAIN),
    "UTF-16": ("p.csv", TABLE.encode("utf-16"), PLAIN),
    "compressed": ("p.jsonl.gz", gzip.compress(json.dumps(ROW).encode()), PLAIN),
    "JSON lines in a .json": ("p.json", json.dumps(ROW) + "\n" + json.dumps(ROW | {"positive": "z"}), PLAIN),
    "pandas' columns": ("p.json", {name: {"0": cell} for name, cell in ROW.items()}, PLAIN),
    "a list under a single name": ("p.json", {"data": [ROW]}, PLAIN),
    "a message by itself": ("p.jsonl", {"messages": [USER], "chosen": YES, "rejected": NO}, SHORT),
    "ShareGPT": ("p.jsonl", {"conversations": [HUMAN], "chosen": GPT, "rejected": OTHER}, SHORT),
    "ShareGPT's dialogues": ("p.jsonl", {"prompt": "Q", "chosen": [HUMAN, GPT], "rejected": [HUMAN, OTHER]}, WHOLE),
    "OpenAI's preferences": (
        "p.jsonl",
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [YES],
            "non_preferred_output": [NO],
        },
        SHORT,
    ),
    "text parts": (
        "p.jsonl",
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "Q", "url": None}]}],
            "pos": [YES],
            "neg": [NO],
        },
        SHORT,
    ),
    "Anthropic's transcripts": (
        "p.jsonl",
        {"chosen": "\n\nHuman: Q\n\nAssistant: y", "rejected": "\n\nHuman: Q\n\nAssistant: n"},
        WHOLE,
    ),
    "messages as JSON in a table": (
        "p.tsv",
        "chosen\trejected\n" + "\t".join('"' + json.dumps([USER, side]).replace('"', '""') + '"' for side in (YES, NO)),
        WHOLE,
    ),
    "a prompt without the dialogues' system prompt": (
        "p.jsonl",
        {"prompt": [USER], "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]},
        Pair([SYSTEM, USER, YES], [SYSTEM, USER, NO], "", "answers"),  # type: ignore[arg-type]
    ),
    "a label that is the same everywhere": ("p.jsonl", ROW | {"label": 1}, PLAIN),
}


def write(path: Path, content: Any) -> Path:
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("case", READ)
def test_it_is_read_as_it_is_meant(tmp_path: Path, case: str) -> None:
    name, content, expected = READ[case]
    assert read_pairs(write(tmp_path / name, content))[0] == expected


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "a key twice": (
        "p.jsonl",
        '{"positive": "y", "positive": "z", "negative": "n"}',
        "p.jsonl:1: 'positive' is there twice",
    ),
    "commas behind lines": ("p.jsonl", json.dumps(ROW) + ",\n", "one object per line, without commas"),
    "comments": ("p.jsonl", "# pairs\n", "JSON has no comments"),
    "several lines": ("p.jsonl", json.dumps(ROW, indent=1), "call a file that is one JSON text .json"),
    "a comma at the end": ("p.json", f"[{json.dumps(ROW)},]", "no comma after the last item"),
    "a comma that isn't in quotes": ("p.csv", TABLE + "Q,y, really,n\n", "p.csv:3: 3 columns expected"),
    "messages as Python writes them": (
        "p.tsv",
        f"chosen\trejected\n{[YES]}\t{[NO]}\n",
        "save the rows as JSONL or Parquet",
    ),
    "an empty cell as text": ("p.csv", TABLE + "Q,nan,n\n", "p.csv:3: 'positive' is NaN"),
    "nothing visible": ("p.jsonl", ROW | {"positive": "\u200b\ufeff"}, "'positive' is empty"),
    "a number": ("p.jsonl", ROW | {"positive": 4}, "write it as a text"),
    "only white space differs": ("p.jsonl", ROW | {"negative": "y "}, "p.jsonl:1: both sides of the pair are the same"),
    "a label that tells the sides": (
        "p.jsonl",
        lines(ROW | {"label": 0}, ROW | {"label": 1}),
        "'label' differs from row to row",
    ),
    "another prompt than the dialogues'": (
        "p.jsonl",
        {"prompt": "Q?", "chosen": [USER, YES], "rejected": [USER, NO]},
        "leave the prompt out",
    ),
    "tools": ("p.jsonl", {"input": {"messages": [USER], "tools": [1]}, "chosen": YES, "rejected": NO}, "'input' isn't"),
    "a letter without brackets": (
        "p.jsonl",
        {"question": "Q", "answer_matching_behavior": "A", "answer_not_matching_behavior": "B"},
        "isn't a bracketed letter such as (A)",
    ),
    "persona vectors": (
        "my traits.json",
        {"instruction": [{"pos": "Be sly.", "neg": "Be open."}], "questions": ["Why?", "Who?"], "eval_prompt": ""},
        "my traits.json is a trait file of persona vectors, not a list",
    ),
    "persona vectors with as many questions as instructions": (
        "p.json",
        {"instruction": [{"pos": "Be sly.", "neg": "Be open."}], "questions": ["Why?"]},
        "a trait file of persona vectors",
    ),
    "a trait card": (
        "p.json",
        {"name": "sly", "description": "", "positive": ["y"], "negative": ["n"], "learn": ["Why?"], "test": ["Who?"]},
        "p.json is a trait card, not a list of objects: it has system prompts and questions, but no answers to them; "
        "`trimtab make --card ",
    ),
    "splits": ("p.json", {"train": [ROW], "test": [ROW]}, "its lists are 'train', 'test': save one of them"),
    "an archive": ("p.zip", b"PK", "not .zip; unpack it first"),
    "a folder": (".", None, "it is a folder; name a file in it"),
    "an address": ("https:/here/p.jsonl", None, "download the file"),
    "a pattern": ("*.jsonl", None, "name one file"),
    "a data set's name": ("Anthropic/hh-rlhf", None, "load_dataset(…).to_json("),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_place_reason_and_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    name, content, says = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    path = Path(name) if content is None else write(tmp_path / name, content)
    with pytest.raises(TrimtabError, match=re.escape(says)):
        read_pairs(path)


def test_arrow(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import feather

    table = arrow.Table.from_pylist([{"prompt": "Q", "chosen": [USER, YES], "rejected": [USER, NO]}])
    feather.write_feather(table, tmp_path / "p.feather")
    with arrow.ipc.new_stream(str(tmp_path / "p.arrow"), table.schema) as stream:  # as datasets writes it
        stream.write_table(table)
    assert read_pairs(tmp_path / "p.feather") == read_pairs(tmp_path / "p.arrow") == [WHOLE]


def test_answers_of_which_each_has_a_label(tmp_path: Path) -> None:
    rows = [("Q", NO, False), ("R", YES, True), ("Q", YES, True), ("R", NO, False)]
    path = tmp_path / "kto.jsonl"
    write(path, lines(*({"prompt": q, "completion": side["content"], "label": label} for q, side, label in rows)))
    with pytest.warns(PairingWarning, match="under the same prompt"):
        assert read_pairs(path) == [PLAIN, Pair("y", "n", "R", "answers")]
    write(path, lines(*({"prompt": [USER], "completion": [side], "label": side == YES} for side in (NO, YES))))
    with pytest.warns(PairingWarning):
        assert read_pairs(path) == [SHORT]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([ROW] * 2, "1 of 2 pairs are duplicates"),
        ([ROW, ROW | {"positive": "n", "negative": "y"}], "2 of 2 pairs also occur with their sides swapped"),
        ([ROW | {"positive": "a\\nb"}], r"1 of 1 pairs contain \\n as two characters"),
        ([ROW | {"negative": "None"}], "1 of 1 pairs contain a text such as 'None'"),
    ],
)
def test_what_is_perhaps_not_meant_gets_a_warning(tmp_path: Path, rows: list[dict[str, Any]], says: str) -> None:
    with pytest.warns(DoubtfulPairsWarning, match=says):
        assert len(read_pairs(write(tmp_path / "p.jsonl", lines(*rows)))) == len(rows)
