"""Pairs are given in whatever shape is at hand, and what can't be learned from says what to give instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import prompt

import trimtab
from trimtab import LM, Pair, TrimtabError, UnsupportedError, learn_caa, learn_instruct, learn_repe
from trimtab.engines.vllm.lm import VllmLM
from trimtab.learn.inputs import check_lm
from trimtab.methods.recipe import recipes
from trimtab.text.pairs import as_pairs, digest
from trimtab.tune import learn_operations

TEXTS = [(prompt(i, 4), prompt(50 + i, 4)) for i in range(4)]
ANSWERS = [(prompt(90 + i, 5), positive, negative) for i, (positive, negative) in enumerate(TEXTS)]
ROWS = [dict(zip(("prompt", "positive", "negative"), row, strict=True)) for row in ANSWERS]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


def test_tuples_lists_and_dictionaries_are_pairs() -> None:
    texts = [Pair(positive, negative) for positive, negative in TEXTS]
    answers = [Pair(positive, negative, question, "answers") for question, positive, negative in ANSWERS]
    assert as_pairs(TEXTS) == as_pairs([list(pair) for pair in TEXTS]) == as_pairs(iter(texts)) == texts
    assert as_pairs(ANSWERS) == as_pairs(ROWS) == as_pairs([ANSWERS[0], ROWS[1], *answers[2:]]) == answers
    talk = [{"role": "user", "content": "Hi"}]
    (pair,) = as_pairs([(talk, "Hello!", "Go away.")])
    assert pair.prompt == (("user", "Hi"),)
    assert pair.shape == "answers"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("pairs.jsonl", r"read a file with read_pairs\('pairs.jsonl'\)"),
        (Path("pairs.jsonl"), r"read a file with read_pairs\('pairs.jsonl'\)"),
        (Pair("a", "b"), "got one Pair; put it in a list"),
        (ROWS[0], "got one dict; put it in a list"),
        (TEXTS[0], r"pairs\[0\] is a text, 'w.*, not a pair"),
        (3, "got int"),
        ([("a", "b", "c", "d")], r"pairs\[0\] isn't a pair; .*\(prompt, positive, negative\).* got 4 items"),
        ([TEXTS[0], None], r"pairs\[1\] isn't a pair; .* got NoneType"),
        ([TEXTS[0], ("a", "")], r"pairs\[1\]: 'negative' is empty"),
        ([("a", "a")], r"pairs\[0\]: both sides of the pair are the same"),
        ([("a", 5)], r"pairs\[0\]: 'negative' is empty or not text"),
        ([TEXTS[0], ANSWERS[0]], r"pairs\[1\] is a pair of answers among pairs of texts"),
        ([{"good": "a", "bad": "b"}], r"pairs\[0\]: not a pair: its keys are good, bad"),
    ],
)
def test_what_is_no_pair_says_why(value: Any, why: str) -> None:
    with pytest.raises(TrimtabError, match=why):
        as_pairs(value)


def test_a_table_says_how_its_rows_are_given() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(ROWS)
    with pytest.raises(TrimtabError, match=r"got a DataFrame; pass its .to_dict\('records'\)"):
        as_pairs(table)
    assert as_pairs(table.to_dict("records")) == as_pairs(ANSWERS)


PAIRED = {
    name: recipe
    for name, recipe in recipes().items()
    if recipe.takes == "pairs" and recipe.sites != "router"  # no mixture of experts here: see test_routers.py
}
SMALL: dict[str, dict[str, Any]] = {"iti": {"heads": 2}, "sadi": {"k": 2}, "cast": {}}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PAIRED)
def test_every_method_learns_the_same_from_tuples(lm: LM, name: str) -> None:
    learn = PAIRED[name].load()
    options = SMALL.get(name, {})
    if name in ("reps", "bipo", "loreft"):
        options = {"steps": 1, "held_out": ANSWERS[:1]}
    if name == "cast":
        options = {"when": [prompt(i, 6) for i in range(6)], "unless": [prompt(20 + i, 9) for i in range(6)]}
    rows = TEXTS if "answers" not in PAIRED[name].shapes else ANSWERS
    from_tuples = learn(lm, rows, **options)
    assert from_tuples == learn(lm, as_pairs(rows), **options)
    assert from_tuples.edits


@pytest.mark.parametrize("name", recipes())
def test_every_method_wants_the_lm_and_not_its_model(lm: LM, name: str) -> None:
    recipe = recipes()[name]
    inputs = {"pairs": [ANSWERS], "texts": [["w3 w4"]], "nothing": []}[recipe.takes]
    for wrong, why in (
        (lm.model, r"this is a model \(LlamaForCausalLM\): give lm where you gave lm.model"),
        ("gpt2", r"give LM.load\('gpt2'\)"),
        (object(), "got object: give LM.load"),
    ):
        with pytest.raises(TrimtabError, match=why):
            getattr(trimtab, recipe.function.partition(":")[2])(wrong, *inputs)


def test_an_engine_that_cannot_learn_like_this_says_so() -> None:
    lm = VllmLM.__new__(VllmLM)
    check_lm(lm)
    with pytest.raises(
        UnsupportedError,
        match=r"vllm engine doesn't support learning with gradients .*; the transformers engine",
    ):
        check_lm(lm, "training")


def test_layers_are_whole_numbers(lm: LM) -> None:
    for layers in ("2", 1.5, [0, "1"]):
        with pytest.raises(TrimtabError, match=r"layers are a whole number, or a list of them such as \[12, 14\], got"):
            learn_caa(lm, TEXTS, layers)  # type: ignore[arg-type]


def test_a_search_starts_from_tuples_too(lm: LM) -> None:
    learned = learn_operations(lm, TEXTS, [1, 2])
    assert learned == learn_operations(lm, as_pairs(TEXTS), [1, 2])
    assert learned["add"].card.data == digest(as_pairs(TEXTS))


def test_methods_still_say_which_shapes_they_take(lm: LM) -> None:
    with pytest.raises(TrimtabError, match="pairs of answers are for the method caa"):
        learn_instruct(lm, ANSWERS)
    with pytest.raises(TrimtabError, match="there are no pairs to learn from"):
        learn_repe(lm, [])
