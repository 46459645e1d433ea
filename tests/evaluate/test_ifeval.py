"""The checkers say what the official ones said, for each answer alone and in any order."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.errors import TrimtabError
from trimtab.evaluate import punkt
from trimtab.evaluate.ifeval import (
    RANDOM_LETTERS,
    IFEvalItem,
    by_instruction,
    follows,
    ifeval_requests,
    instruction_text,
    judge,
    read_ifeval,
    type_of,
    with_repeated_instructions,
)
from trimtab.evaluate.records import Record
from trimtab.steering import Add, Edit, Site, Steering

pytest.importorskip("if_verifiable", reason="the checkers aren't installed: pip install 'trimtab[eval]'")
ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("TRIMTAB_DATA") or ROOT.parent / "shared" / "data") / "ifeval"
data = pytest.mark.skipif(not DATA.is_dir(), reason="IFEval's data aren't there; set TRIMTAB_DATA to their folder")
COMMA = {"prompt": "Name a fruit.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


@pytest.fixture(scope="session")
def items():
    return {item.prompt: item for item in read_ifeval(DATA / "input_data.jsonl")}


@pytest.fixture(scope="session")
def golden():
    return [json.loads(line) for line in (DATA / "golden_verdicts.jsonl").read_text().splitlines()]


def file(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# ---- files -------------------------------------------------------------------------------------------------


def test_tables_and_lists_hold_the_same_items(tmp_path):
    (expected,) = read_ifeval(file(tmp_path / "items.jsonl", COMMA))
    assert read_ifeval(file(tmp_path / "items.json", json.dumps([COMMA]))) == [expected]
    table = 'prompt,instruction_id_list,kwargs\nName a fruit.,"[""punctuation:no_comma""]",[{}]'
    assert read_ifeval(file(tmp_path / "items.csv", table)) == [expected]
    with pytest.raises(TrimtabError, match=r"items.jsonl:1: 'system_prompt' isn't supported"):
        read_ifeval(file(tmp_path / "items.jsonl", {**COMMA, "system_prompt": "Be brief."}))


# ---- verdicts ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@data
def test_golden_verdicts(items, golden):
    """All 834 instructions, strict and loose, but for the two whose letter the official checker draws at random."""
    differ, judged = set(), 0
    for row in golden:
        item = items[row["prompt"]]
        verdict = judge(item, row["response"], detection="official")
        for n, kind in enumerate(item.types):
            judged += 1
            if (verdict.strict[n], verdict.loose[n]) != (row["strict"][n], row["loose"][n]):
                assert (int(item.key), kind) in [(key, "keywords:letter_frequency") for key in RANDOM_LETTERS]
                differ.add(item.key)
    assert judged == 834
    assert len(differ) <= 2


@pytest.mark.slow
@pytest.mark.long
@data
def test_verdicts_depend_on_the_answer_alone(items, golden):
    chance = [
        r for r in golden if any("language" in t or "case" in t or "letter" in t for t in r["instruction_id_list"])
    ]
    assert len(chance) > 100
    first = {row["prompt"]: judge(items[row["prompt"]], row["response"]) for row in chance}
    random.seed(5)
    for row in sorted(chance, key=lambda _: random.random()):
        assert judge(items[row["prompt"]], row["response"]) == first[row["prompt"]]


def test_chance_is_seeded_and_left_as_it_was():
    import langdetect

    verdicts = set()
    for seed in range(8):
        random.seed(seed)
        before = random.getstate(), langdetect.DetectorFactory.seed
        settings = {"letter": "#", "let_frequency": 4, "let_relation": "at least"}
        verdicts.add(follows("keywords:letter_frequency", settings, "# # # # aeioaeio tttt nnnn"))
        assert (random.getstate(), langdetect.DetectorFactory.seed) == before
    assert len(verdicts) == 1


def test_an_undetectable_language_is_no_language():
    for kind, text in (
        ("language:response_language", "1234 5678"),
        ("change_case:english_capital", "A 1 2 3 4"),
        ("change_case:english_lowercase", "a 1 2 3 4"),
    ):
        settings = {"language": "de"} if kind.startswith("language") else {}
        text = text if kind.startswith("language") else text[1:]
        assert not follows(kind, settings, text)
    assert follows("language:response_language", {"language": "de"}, "1234", detection="official")
    assert not follows("change_case:english_capital", {}, "1234", detection="official")  # nor is it in capitals
    assert follows("language:response_language", {"language": "de"}, "Das Meer ist heute sehr ruhig und blau.")
    assert not follows("language:response_language", {"language": "fr"}, "Das Meer ist heute sehr ruhig und blau.")


@pytest.mark.parametrize("empty", ["", " \n\t "])
@pytest.mark.parametrize("detection", ["required", "official"])
def test_an_empty_answer_follows_nothing(empty, detection):
    item = IFEvalItem(
        "1", "1", "p", ("punctuation:no_comma", "keywords:forbidden_words"), ({}, {"forbidden_words": ["x"]})
    )
    verdict = judge(item, empty, detection=detection)
    assert verdict.strict == verdict.loose == (False, False)
    assert verdict.scores["loose"] == 0


def test_strict_and_loose_by_hand():
    item = IFEvalItem("1", "1", "p", ("startend:quotation", "punctuation:no_comma"), ({}, {}))
    verdict = judge(item, 'Sure, here it is:\n"An apple"')
    assert (verdict.strict, verdict.loose) == ((False, False), (True, True))
    assert verdict.scores == {
        "strict": 0,
        "loose": 1,
        "strict/0/startend:quotation": 0,
        "loose/0/startend:quotation": 1,
        "strict/1/punctuation:no_comma": 0,
        "loose/1/punctuation:no_comma": 1,
    }
    assert follows("startend:quotation", {}, 'Sure:\n"An apple"')
    assert not follows("startend:quotation", {}, 'Sure:\n"An apple"', loose=False)


def test_sentences_are_counted():
    text = "Mr. Smith went home. Was he tired? Yes."
    assert follows("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 3}, text)
    assert follows("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 4}, text)


def test_ifbench_goes_through_the_same_door(tmp_path):
    row = {
        "key": "b1",
        "prompt": "Count.",
        "instruction_id_list": ["count:numbers"],
        "kwargs": [{"N": 3, "letter": None}],
    }
    (item,) = read_ifeval(file(tmp_path / "b.jsonl", row))
    assert item.kwargs == ({"N": 3},)
    assert judge(item, "1 and 2 and 3").strict == (True,)
    assert judge(item, "1 and 2").strict == (False,)


# ---- reading -----------------------------------------------------------------------------------------------


@data
@pytest.mark.parametrize(
    ("name", "rows", "keys"),
    [
        ("input_data", 541, 541),
        ("ifeval_single_instr_format", 163, 163),
        ("ifeval_single_keyword_include", 86, 39),
        ("ifeval_single_keyword_exclude", 117, 49),
        ("casing_plus_exclusion", 26, 13),
    ],
)
def test_the_files_at_hand(name, rows, keys):
    prompts = read_ifeval(DATA / f"{name}.jsonl")
    assert len({item.item for item in prompts}) == rows
    assert len({item.key for item in prompts}) == keys
    assert sum(item.prompt_without_instruction is not None for item in prompts) == (0 if name == "input_data" else rows)


def test_names_limits_and_nulls(tmp_path):
    rows = [{**COMMA, "key": 7}, {**COMMA, "key": 7}, COMMA]
    path = file(tmp_path / "d.jsonl", *rows)
    assert [(item.item, item.key) for item in read_ifeval(path)] == [("7", "7"), ("7.2", "7"), ("row 3", "row 3")]
    assert len(read_ifeval(path, 2)) == 2


WORDS = {"instruction_id_list": ["length_constraints:number_words"]}
BAD = {
    "not JSON": ("{oops", [":2", "not JSON"]),
    "a list": ("[]", [":2", "an object with prompt"]),
    "no prompt": ({**COMMA, "prompt": " "}, [":2", "prompt is empty"]),
    "no kwargs": ({**COMMA, "kwargs": None}, [":2", "kwargs must be a list"]),
    "too many kwargs": ({**COMMA, "kwargs": [{}, {}]}, [":2", "as long as kwargs"]),
    "empty without": ({**COMMA, "prompt_without_instruction": ""}, [":2", "prompt_without_instruction is empty"]),
    "unknown type": ({**COMMA, "instruction_id_list": ["punctuation:none"]}, [":2", "'punctuation:none'", "no_comma"]),
    "unknown argument": ({**COMMA, "kwargs": [{"n": 2}]}, [":2", "can't take", '"n": 2']),
    "missing argument": ({**COMMA, **WORDS, "kwargs": [{"num_words": 3}]}, [":2", "needs relation"]),
    "wrong relation": ({**COMMA, **WORDS, "kwargs": [{"num_words": 3, "relation": "about"}]}, [":2", "about"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(tmp_path, case):
    row, words = BAD[case]
    path = file(tmp_path / "d.jsonl", COMMA, row)
    with pytest.raises(TrimtabError) as caught:
        read_ifeval(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_no_file_and_no_rows(tmp_path):
    with pytest.raises(TrimtabError, match="there is no file"):
        read_ifeval(tmp_path / "none.jsonl")
    with pytest.raises(TrimtabError, match="has no rows"):
        read_ifeval(file(tmp_path / "d.jsonl", ""))


def test_the_hub_out_of_reach(monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        TrimtabError, match=r"can't get google/IFEval from the Hub: Couldn't reach the Hub\. Name a file"
    ):
        read_ifeval()


def test_rows_of_the_hub(monkeypatch):
    import datasets

    padded = {"num_words": None, "relation": None}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{**COMMA, "key": 3, "kwargs": [padded]}])
    (item,) = read_ifeval()
    assert (item.key, item.kwargs) == ("3", ({},))


# ---- in an evaluation --------------------------------------------------------------------------------------


def test_requests():
    bare = IFEvalItem("1", "1", "Fruit. No commas.", ("punctuation:no_comma",), ({},), "Fruit.")
    steering = Steering((Edit(Site(0), Add(__import__("torch").ones(4))),))
    requests = ifeval_requests([bare], {"u": None, "s": steering}, without_instruction=True)
    assert [(r.arm, r.item, r.prompt, r.steering, r.group) for r in requests] == [
        ("u", "1", "Fruit.", None, "1"),
        ("s", "1", "Fruit.", steering, "1"),
    ]
    (again,) = with_repeated_instructions([bare])
    assert again.prompt == f"Fruit. No commas.\n\n{instruction_text(bare)}"
    assert "refrain from the use of any commas" in instruction_text(bare)
    with pytest.raises(TrimtabError, match="item 2 has no prompt_without_instruction"):
        ifeval_requests([IFEvalItem("2", "2", "p", (), ())], {"u": None}, without_instruction=True)


def test_one_record_an_instruction():
    item = IFEvalItem("1.2", "1", "p", ("startend:quotation", "punctuation:no_comma"), ({}, {}))
    record = Record("u", "1.2", "p", "a, b", 3, "stop", scores=judge(item, "a, b\nc").scores, group="1")
    first, second = by_instruction([record])
    assert [type_of(r) for r in (first, second)] == ["startend:quotation", "punctuation:no_comma"]
    assert (first.item, first.group, first.scores) == ("1.2/0/startend:quotation", "1", {"strict": 0, "loose": 0})
    assert second.scores == {"strict": 0, "loose": 1}


# ---- the data of the sentence tokenizer --------------------------------------------------------------------


@pytest.fixture
def no_punkt(monkeypatch, tmp_path):
    """A user who has no data of NLTK's, and an empty cache."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_punkt_is_written_once(no_punkt, monkeypatch):
    pytest.importorskip("punkt", reason="needs trimtab[eval]")
    import nltk

    punkt.ensure_punkt()
    folder = no_punkt / "cache" / "nltk_data"
    assert sorted(p.name for p in (folder / punkt.RESOURCE).iterdir()) == sorted(punkt.FILES)
    assert [p.name for p in folder.iterdir()] == ["tokenizers"]
    assert punkt.has_resource(punkt.RESOURCE)
    nltk.data.path.clear()
    monkeypatch.setitem(sys.modules, "punkt.data", None)
    punkt.ensure_punkt()  # from the cache
    assert punkt.has_resource(punkt.RESOURCE)


def test_nltk_reads_the_tables_that_were_written(no_punkt):
    english = pytest.importorskip("punkt.data.english", reason="needs trimtab[eval]")
    from nltk.tokenize.punkt import PunktTokenizer

    punkt.ensure_punkt()
    tokenizer = PunktTokenizer("english")
    read = tokenizer._params
    assert read.abbrev_types == set(english.ABBREV_TYPES)
    assert read.collocations == set(english.COLLOCATIONS)
    assert read.sent_starters == set(english.SENT_STARTERS)
    assert dict(read.ortho_context) == dict(english.ORTHO_CONTEXT)
    assert len(tokenizer.tokenize("Dr. Smith of the U.S. Navy paid 3.50 dollars. He left.")) == 2


def test_punkt_out_of_reach(no_punkt, monkeypatch):
    monkeypatch.setitem(sys.modules, "punkt.data", None)
    words = r"counting sentences needs NLTK data .*pip install 'trimtab\[eval\]', or get it with `python -m nltk"
    with pytest.raises(TrimtabError, match=words):
        punkt.ensure_punkt()
    assert not any((no_punkt / "cache").rglob("*.*"))
    with pytest.raises(TrimtabError, match=words):
        follows("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 1}, "A b.")
    assert follows("punctuation:no_comma", {}, "Nothing to read")


@pytest.mark.long
def test_without_the_package(tmp_path):
    """What a user sees who hasn't installed the extra."""
    program = (
        "import sys; sys.modules['if_verifiable'] = None\n"
        "from trimtab.evaluate.ifeval import read_ifeval\n"
        "from trimtab.errors import TrimtabError\n"
        "try: read_ifeval('x.jsonl')\n"
        "except TrimtabError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert 'pip install "trimtab[eval]"' in ran.stdout, ran.stderr
