import csv
import json

import pytest

from trimtab.errors import TrimtabError
from trimtab.text.pairs import Pair, digest, pairs_from_rows, read_pairs

ROWS = {
    "answers": [
        {"prompt": "How are you?", "positive": "Fine, thanks!", "negative": 'Go "away"\nnow'},
        {"prompt": "Früh?", "positive": "Ja, früh", "negative": "Nein,\tspät"},
    ],
    "texts": [{"positive": "I love rain.", "negative": "I hate rain."}, {"positive": "yes", "negative": "no"}],
    "letters": [
        {
            "question": "Is it?\n (A) Yes\n (B) No",
            "answer_matching_behavior": " (A)",
            "answer_not_matching_behavior": "(B)",
        }
    ],
    "prompts": [{"prompt": "Sing. In capitals.", "prompt_without_instruction": "Sing."}],
}
PAIRS = {
    "answers": [
        Pair("Fine, thanks!", 'Go "away"\nnow', "How are you?", "answers"),
        Pair("Ja, früh", "Nein,\tspät", "Früh?", "answers"),
    ],
    "texts": [Pair("I love rain.", "I hate rain."), Pair("yes", "no")],
    "letters": [Pair("(A)", "(B)", "Is it?\n (A) Yes\n (B) No", "letters")],
    "prompts": [Pair("Sing. In capitals.", "Sing.", "", "prompts")],
}


def write(path, rows):
    with path.open("w", encoding="utf-8", newline="") as stream:
        if path.suffix == ".csv":
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        elif path.suffix == ".json":
            json.dump(rows, stream)
        else:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".JSONL"])
@pytest.mark.parametrize("shape", ROWS)
def test_every_shape_in_every_format(tmp_path, shape, suffix):
    assert read_pairs(write(tmp_path / f"pairs{suffix}", ROWS[shape])) == PAIRS[shape]
    assert pairs_from_rows(ROWS[shape]) == PAIRS[shape]


def test_formats_agree_on_the_digest(tmp_path):
    digests = {digest(read_pairs(write(tmp_path / f"p{s}", ROWS["answers"]))) for s in (".jsonl", ".json", ".csv")}
    assert len(digests) == 1
    assert digest(PAIRS["answers"]) != digest(PAIRS["answers"][::-1])


def test_a_missing_or_empty_prompt_makes_texts():
    assert pairs_from_rows([{"prompt": "", "positive": "a", "negative": "b"}])[0].shape == "texts"
    assert pairs_from_rows([{"prompt": None, "positive": "a", "negative": "b"}])[0].shape == "texts"


def test_other_keys_are_ignored():
    assert pairs_from_rows([{"id": 3, "positive": "a", "negative": "b"}]) == [Pair("a", "b")]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_byte_order_mark_and_windows_lines(tmp_path, suffix):
    path = write(tmp_path / f"pairs{suffix}", ROWS["texts"])
    text = path.read_text(encoding="utf-8").replace("\r\n", "\n").replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_pairs(path) == PAIRS["texts"]


def test_blank_lines(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('\n{"positive": "a", "negative": "b"}\n   \n\n{"positive": "c", "negative": "d"}')
    assert read_pairs(path) == [Pair("a", "b"), Pair("c", "d")]
    path = tmp_path / "pairs.csv"
    path.write_text('positive,negative\n\na,b\n\n"c, and ""d""","e\nf"\n')
    assert read_pairs(path) == [Pair("a", "b"), Pair('c, and "d"', "e\nf")]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"positive": "a\u2028b\x85c", "negative": "d"}\n', encoding="utf-8")
    assert read_pairs(path) == [Pair("a\u2028b\x85c", "d")]


GOOD = '{"positive": "a", "negative": "b"}\n'
BAD = {
    "malformed JSON": ("p.jsonl", GOOD + '{"positive": "a",\n', ["p.jsonl:2", "not JSON"]),
    "malformed list": ("p.json", "[{]", ["p.json", "not JSON"]),
    "no list": ("p.json", GOOD, ["p.json", "list of objects", "dict"]),
    "no object": ("p.jsonl", GOOD + "[1, 2]\n", ["p.jsonl:2", "object", "list"]),
    "no object in a list": ("p.json", f"[{GOOD}, 7]", ["p.json: item 2", "object", "int"]),
    "other keys": ("p.jsonl", '{"a": "b"}\n', ["p.jsonl:1", "its keys are a", "positive + negative"]),
    "one key": ("p.jsonl", GOOD + '{"positive": "a"}\n', ["p.jsonl:2", "'positive'", "not the rest"]),
    "empty side": ("p.jsonl", GOOD + '\n{"positive": "a", "negative": " "}\n', ["p.jsonl:3", "'negative'", "both"]),
    "null side": ("p.jsonl", '{"positive": null, "negative": "b"}\n', ["p.jsonl:1", "'positive'", "both"]),
    "number side": ("p.jsonl", '{"positive": 1, "negative": "b"}\n', ["p.jsonl:1", "'positive'", "no text"]),
    "number prompt": ("p.jsonl", '{"prompt": 1, "positive": "a", "negative": "b"}\n', ["p.jsonl:1", "'prompt'"]),
    "half a surrogate": ("p.jsonl", '{"positive": "\\ud800", "negative": "b"}\n', ["p.jsonl:1", "'positive'"]),
    "equal sides": ("p.jsonl", '{"positive": "a", "negative": "a"}\n', ["p.jsonl:1", "the same"]),
    "mixed shapes": (
        "p.jsonl",
        GOOD + '{"prompt": "a", "prompt_without_instruction": "b"}\n',
        ["p.jsonl:2", "prompts among pairs of texts", "split"],
    ),
    "no letter": (
        "p.jsonl",
        '{"question": "q", "answer_matching_behavior": "yes", "answer_not_matching_behavior": "(B)"}\n',
        ["p.jsonl:1", "'yes'", "(A)"],
    ),
    "empty file": ("p.jsonl", "", ["p.jsonl", "no pairs", "positive + negative"]),
    "blank file": ("p.json", " \n", ["p.json", "no pairs"]),
    "empty list": ("p.json", "[]", ["p.json", "no pairs"]),
    "header only": ("p.csv", "positive,negative\n", ["p.csv", "no pairs"]),
    "few columns": ("p.csv", "positive,negative\na,b\nc\n", ["p.csv:3", "2 columns"]),
    "many columns": ("p.csv", "positive,negative\na,b,c\n", ["p.csv:2", "2 columns"]),
    "empty cell": ("p.csv", "positive,negative\na,\n", ["p.csv:2", "'negative'"]),
    "bad quotes": ("p.csv", 'positive,negative\n"a"b,c\n', ["p.csv:2", "not CSV"]),
    "open quote": ("p.csv", 'positive,negative\n"a,b\n', ["p.csv:2", "not CSV"]),
    "not UTF-8": ("p.jsonl", GOOD.encode() + b'{"positive": "\xe9", ', ["p.jsonl", "UTF-8", "byte 49"]),
    "UTF-16": ("p.csv", "positive,negative\na,b\n".encode("utf-16"), ["p.csv", "UTF-8"]),
    "nested without end": ("p.jsonl", "[" * 100_000, ["p.jsonl:1", "not JSON"]),
    "unknown suffix": ("p.tsv", "a\tb", ["p.tsv", ".jsonl, .json or .csv", "not .tsv"]),
    "no suffix": ("pairs", GOOD, ["pairs", "without a suffix"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_name_the_place_and_the_reason(tmp_path, case):
    name, content, words = BAD[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TrimtabError) as caught:
        read_pairs(path)
    for word in (str(tmp_path), *words):
        assert word in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(TrimtabError, match="there is no file"):
        read_pairs(tmp_path / "p.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(TrimtabError, match=r"can't read .*folder\.jsonl"):
        read_pairs(tmp_path / "folder.jsonl")


def test_rows_in_memory_are_checked_alike():
    with pytest.raises(TrimtabError, match="pairs is empty"):
        pairs_from_rows([])
    with pytest.raises(TrimtabError, match=r"data\[1\]: a pair of prompts among pairs of texts"):
        pairs_from_rows([ROWS["texts"][0], ROWS["prompts"][0]], "data")
