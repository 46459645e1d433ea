import csv
import json
import re

import pytest

from trimtab.errors import TrimtabError
from trimtab.text.pairs import Pair, Side, as_prompt, as_texts, conversation, digest, pairs_from_rows, read_pairs, sides

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
    "number side": ("p.jsonl", '{"positive": 1, "negative": "b"}\n', ["p.jsonl:1", "'positive'", "not text"]),
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
    "UTF-16 without a mark": ("p.csv", "positive,negative\na,b\n".encode("utf-16-le"), ["p.csv", "UTF-8"]),
    "nested without end": ("p.jsonl", "[" * 100_000, ["p.jsonl:1", "not JSON"]),
    "unknown suffix": ("p.xlsx", "a\tb", ["p.xlsx", ".jsonl, .json, .csv, .tsv or .parquet", "not .xlsx"]),
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


# ---- messages and system prompts -------------------------------------------------------------------------------

USER, REPLY = {"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}
SYSTEM = {"role": "system", "content": "You are kind."}
MORE = {
    "messages as the prompt": (
        {"prompt": [SYSTEM, USER], "positive": "Fine.", "negative": "Go."},
        (
            Side((("system", "You are kind."), ("user", "How are you?")), "Fine."),
            Side((("system", "You are kind."), ("user", "How are you?")), "Go."),
        ),
    ),
    "one system prompt": (
        {"system": "You are kind.", "prompt": "How are you?", "positive": "Fine.", "negative": "Go."},
        (Side("How are you?", "Fine.", "You are kind."), Side("How are you?", "Go.", "You are kind.")),
    ),
    "system prompts, and the same answer": (
        {
            "positive_system": "You are rude.",
            "negative_system": "You are kind.",
            "prompt": "How are you?",
            "positive": "Fine.",
            "negative": "Fine.",
        },
        (Side("How are you?", "Fine.", "You are rude."), Side("How are you?", "Fine.", "You are kind.")),
    ),
    "whole conversations": (
        {"positive": [SYSTEM, USER, REPLY], "negative": [USER, REPLY]},
        (
            Side((("system", "You are kind."), ("user", "How are you?")), "Fine."),
            Side((("user", "How are you?"),), "Fine."),
        ),
    ),
    "an answer that is a message": (
        {"prompt": "How are you?", "positive": [REPLY], "negative": "Go."},
        (Side("How are you?", "Fine."), Side("How are you?", "Go.")),
    ),
    "a prompt that goes on": (
        {"prompt": "Hello", "positive": [REPLY, USER, REPLY], "negative": "Go.", "positive_system": "x"},
        (
            Side((("user", "Hello"), ("assistant", "Fine."), ("user", "How are you?")), "Fine.", "x"),
            Side("Hello", "Go."),
        ),
    ),
    "two prompts of messages": (
        {"prompt": [SYSTEM, USER], "prompt_without_instruction": [USER]},
        (
            Side((("system", "You are kind."), ("user", "How are you?")), ""),
            Side((("user", "How are you?"),), ""),
        ),
    ),
    "an instruction in the system prompt": (
        {"prompt": "Sing.", "prompt_without_instruction": "Sing.", "positive_system": "Use capitals."},
        (Side("Sing.", "", "Use capitals."), Side("Sing.", "")),
    ),
    "letters under a system prompt": (
        {**ROWS["letters"][0], "system": "Be brief."},
        (
            Side("Is it?\n (A) Yes\n (B) No", "(A)", "Be brief."),
            Side("Is it?\n (A) Yes\n (B) No", "(B)", "Be brief."),
        ),
    ),
    "an empty system prompt is none": (
        {"prompt": "a", "positive": "b", "negative": "c", "system": " ", "positive_system": None},
        (Side("a", "b"), Side("a", "c")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MORE)
def test_messages_and_system_prompts(tmp_path, case):
    row, expected = MORE[case]
    (pair,) = read_pairs(write(tmp_path / "p.jsonl", [row]))
    assert sides(pair) == expected
    assert read_pairs(write(tmp_path / "p.json", [row])) == [pair]
    assert len({pair, *pairs_from_rows([row])}) == 1  # it can be hashed
    assert digest([pair]) == digest(pairs_from_rows([row]))


def test_a_table_has_system_prompts_where_it_has_them(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt,positive,negative,positive_system\na,b,c,\na,b,b,Be rude.\n")
    assert [pair.positive_system for pair in read_pairs(path)] == [None, "Be rude."]


def test_a_pair_made_in_python_takes_messages_as_they_come():
    pair = Pair("Fine.", "Go.", [SYSTEM, USER], "answers")
    assert pair.prompt == (("system", "You are kind."), ("user", "How are you?"))
    assert pair == Pair("Fine.", "Go.", pair.prompt, "answers")
    assert hash(pair) == hash(Pair("Fine.", "Go.", pair.prompt, "answers"))
    assert as_prompt(pair.prompt) == [SYSTEM, USER]
    assert as_prompt("Hello") == "Hello"
    assert conversation([SYSTEM, {**USER, "name": None}]) == pair.prompt


def test_every_side_is_in_the_digest():
    row = {"prompt": "a", "positive": "b", "negative": "c"}
    others = [{}, {"system": "x"}, {"positive_system": "x"}, {"negative_system": "x"}, {"prompt": [USER]}]
    assert len({digest(pairs_from_rows([{**row, **more}])) for more in others}) == len(others)


def test_digests_are_what_they_always_were():
    expected = {
        "answers": "337cafccdfae8180",
        "texts": "350239d5eddbf256",
        "letters": "982841f58447ff80",
        "prompts": "a28ceb02b977441a",
    }
    assert {shape: digest(pairs) for shape, pairs in PAIRS.items()} == expected


WRONG = {
    "no messages": ({"prompt": "a", "positive": [], "negative": "c"}, "'positive' is a text or a list of messages"),
    "no message": ({"prompt": ["a"], "positive": "b", "negative": "c"}, "'prompt' is {'role'"),
    "no content": ({"prompt": [{"role": "user"}], "positive": "b", "negative": "c"}, "'prompt' is {'role'"),
    "content in parts": (
        {"prompt": [{"role": "user", "content": [{"type": "text"}]}], "positive": "b", "negative": "c"},
        "both texts",
    ),
    "tool calls": ({"prompt": [{**USER, "tool_calls": [1]}], "positive": "b", "negative": "c"}, "has 'tool_calls'"),
    "silence": ({"prompt": [{"role": "user", "content": " "}], "positive": "b", "negative": "c"}, "no message has"),
    "answer of the user": ({"prompt": "a", "positive": [USER], "negative": "c"}, "this one with the user's"),
    "empty answer": ({"positive": [USER, {**REPLY, "content": " "}], "negative": [USER, REPLY]}, "last message says"),
    "answer to a blank": ({"prompt": " ", "positive": [REPLY], "negative": [USER, REPLY]}, "nothing comes before"),
    "answer to nothing": ({"positive": [REPLY], "negative": [USER, REPLY]}, "nothing comes before the assistant's"),
    "text beside a conversation": ({"positive": "b", "negative": [USER, REPLY]}, "'b' has no prompt"),
    "prompt with its answer": ({"prompt": [USER, REPLY], "prompt_without_instruction": [USER]}, "with the assistant's"),
    "messages as a question": ({**ROWS["letters"][0], "question": [USER]}, "'question' is empty or not text"),
    "system of bare texts": ({"positive": "b", "negative": "c", "system": "x"}, "bare texts have none"),
    "system twice": ({"prompt": [SYSTEM, USER], "positive": "b", "negative": "c", "system": "x"}, "twice"),
    "system of both and of one": (
        {"prompt": "a", "positive": "b", "negative": "c", "system": "x", "negative_system": "y"},
        "'system' is the system prompt of both sides",
    ),
    "system that is no text": ({"prompt": "a", "positive": "b", "negative": "c", "system": [1]}, "'system' isn't text"),
    "the same all over": (
        {"prompt": "a", "positive": "b", "negative": [{"role": "assistant", "content": "b"}]},
        "both sides of the pair are the same",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_messages_and_system_prompts_that_can_not_be_read(tmp_path, case):
    row, said = WRONG[case]
    with pytest.raises(TrimtabError, match=re.escape(said)) as caught:
        read_pairs(write(tmp_path / "p.jsonl", [row]))
    assert "p.jsonl:1: " in str(caught.value)


def test_who_takes_plain_texts_says_so():
    assert as_texts(Pair("b", "c", "a", "answers"), "it") == ("a", "b", "c")
    with pytest.raises(TrimtabError, match="it takes pairs of plain texts"):
        as_texts(Pair("b", "c", [USER], "answers"), "it")
    with pytest.raises(TrimtabError, match="it takes pairs without system prompts"):
        as_texts(Pair("b", "c", "a", "answers", negative_system="x"), "it")
