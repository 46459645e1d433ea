from __future__ import annotations

import pytest

from trimtab.data import SPLITS, instruction_pairs, instructions, prompts, queries
from trimtab.evaluate import CONSTRAINTS
from trimtab.text.pairs import pairs_from_rows


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def test_the_queries_are_many_different_and_in_one_split_each():
    every = [_plain(query) for query in queries()]
    assert len(every) == len(set(every)) >= 100
    assert [len(queries(split)) for split in SPLITS] == [48, 32, 32]
    assert sum((queries(split) for split in SPLITS), ()) == queries()


def test_more_queries_come_after_the_others_of_their_split():
    assert [len(queries(split, more=True)) for split in SPLITS] == [64, 48, 56]
    every = [_plain(query) for query in queries(more=True)]
    assert len(every) == len(set(every)) == 168
    for split in SPLITS:
        assert queries(split, more=True)[: len(queries(split))] == queries(split)


def test_the_queries_are_short_clean_and_of_many_kinds():
    for query in queries(more=True):
        assert query == query.strip()
        assert query[-1] in "?."
        assert query[0].isupper()
        assert 3 <= len(query.split()) <= 15
    assert len({query.split()[0] for query in queries()}) >= 10
    assert len({tuple(query.split()[:4]) for query in queries()}) >= 90


def test_no_query_speaks_of_the_form_that_an_instruction_asks_for():
    words = ("json", "title", "german", "bullet", "one sentence", "single sentence", "capital letters", "<<")
    assert not [query for query in queries(more=True) for word in words if word in query.lower()]


def test_an_unknown_split_is_refused():
    with pytest.raises(KeyError):
        queries("train")


@pytest.mark.parametrize("name", sorted(instructions()))
def test_each_instruction_has_phrasings_and_a_check(name):
    instruction = instructions()[name]
    assert instruction.name == name in CONSTRAINTS
    assert len(set(instruction.learn)) == len(instruction.learn) >= 3
    assert instruction.test
    for phrasing in (*instruction.learn, *instruction.test):
        assert phrasing == phrasing.strip()
        assert phrasing.endswith((".", "!"))


def test_prompts_take_phrasings_in_turn():
    assert prompts(("A?", "B?", "C?"), ("x.", "y.")) == ["A? x.", "B? y.", "C? x."]


def test_pairs_are_those_that_a_file_would_give():
    (pair,) = instruction_pairs(("A?",), ("x.",))
    assert [pair] == pairs_from_rows([{"prompt": "A? x.", "prompt_without_instruction": "A?"}])
