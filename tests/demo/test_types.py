"""The types of instructions: complete, in phrasings of their own, and recognised."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from trimtab.data import (
    COMMON_LANGUAGES,
    LANGUAGES,
    instruction_type,
    instruction_types,
    instructions,
    length_phrasings,
    queries,
    recognise,
)
from trimtab.data.types import ALIASES, KINDS
from trimtab.errors import TrimtabError

TYPES = instruction_types()
DATA = Path(os.environ.get("TRIMTAB_DATA") or Path(__file__).parents[3] / "shared" / "data") / "ifeval"


@pytest.fixture(scope="module")
def ifeval():
    path = DATA / "input_data.jsonl"
    if not path.is_file():
        pytest.skip(f"needs IFEval's own prompts in {path} (TRIMTAB_DATA names another folder)")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_there_are_all_of_ifeval_with_its_arguments(ifeval):
    theirs: dict[str, set[str]] = {}
    for row in ifeval:
        for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            theirs.setdefault(name, set()).update(key for key, value in arguments.items() if value is not None)
    assert set(TYPES) == set(theirs)
    for name, kind in TYPES.items():
        values = {p.name: p.values[0] for p in kind.parameters}
        assert set(kind.arguments(values, query="Why?")) == theirs[name], name


def test_the_queries_and_instructions_are_not_ifevals(ifeval):
    theirs = " | ".join(" ".join(row["prompt"].lower().split()) for row in ifeval)
    for text in queries(more=True):
        assert text.lower() not in theirs
    longer = [text for kind in TYPES.values() for text in (*kind.learn, *kind.test) if len(text.split()) > 6]
    assert len(longer) > 100
    for text in longer:
        pattern = r"\S+(?: \S+)?".join(re.escape(piece.lower()) for piece in re.split(r"\{\w+\}", text))
        assert not re.search(pattern, theirs), text


@pytest.mark.parametrize("name", TYPES)
def test_each_has_phrasings_to_learn_from_and_others_to_test_with(name):
    kind = TYPES[name]
    assert kind.kind in KINDS
    every = [*kind.learn, *kind.test]
    assert len(kind.learn) >= 4
    assert len(kind.test) >= 2
    assert len({re.sub(r"\W+", " ", text.lower()) for text in every}) == len(every)
    holes = {p.name for p in kind.parameters}
    for text in every:
        assert text == text.strip()
        assert text[0].isupper() or text[0] in '"{'
        assert set(re.findall(r"\{(\w+)\}", text)) == holes
    for side in ("learn", "test"):
        filled = kind.phrasings(side)
        assert not any("{" in text for text in filled)
        rounds = max((len(p.values) for p in kind.parameters), default=1)
        assert len(filled) == rounds * len(getattr(kind, side))
        for p in kind.parameters:
            assert all(any(str(value) in text for text in filled) for value in p.values)


@pytest.mark.parametrize("name", TYPES)
def test_each_phrasing_is_recognised_with_its_values(name):
    kind = TYPES[name]
    for i, template in enumerate((*kind.learn, *kind.test)):
        values = {p.name: p.values[i % len(p.values)] for p in kind.parameters}
        recognised = recognise(template.format(**values))
        assert recognised is not None
        assert (recognised.type.name, recognised.values, recognised.exact) == (name, values, True)


@pytest.mark.parametrize(
    ("sentence", "name", "values"),
    [
        ("please answer in lowercase letters only", "change_case:english_lowercase", {}),
        ("Use five bullet points exactly", "detectable_format:number_bullet_lists", {"n": 5}),
        ("Reply in Swahili please.", "language:response_language", {"language": "Swahili"}),
        ('Include the word "sea" in the answer.', "keywords:existence", {"word": "sea"}),
        ("Wrap your reply in double quotes", "startend:quotation", {}),
    ],
)
def test_a_sentence_close_to_a_phrasing_is_of_its_type(sentence, name, values):
    recognised = recognise(sentence)
    assert recognised is not None
    assert (recognised.type.name, recognised.values) == (name, values)
    assert 0.7 <= recognised.likeness < 1
    assert not recognised.exact


@pytest.mark.parametrize(
    "sentence",
    ["Answer like a pirate.", "Write your answer in a friendly tone.", "Answer in Klingon.", "Be polite.", "", "!"],
)
def test_others_are_of_none(sentence):
    assert recognise(sentence) is None


@pytest.mark.parametrize("alias", ALIASES)
def test_the_short_names_are_those_of_the_demo_and_lead_to_types(alias):
    assert set(ALIASES) == set(instructions())
    name, values = ALIASES[alias]
    assert instruction_type(alias) == TYPES[name]
    assert set(values) <= {p.name for p in TYPES[name].parameters}
    phrasing = instructions()[alias].learn[0]
    recognised = recognise(phrasing)
    assert recognised is not None
    assert recognised.type.name == name
    assert recognise(phrasing.upper()) == recognise(phrasing.lower()) == recognised


def test_arguments_are_ifevals():
    assert instruction_type("german").arguments({"language": "German"}) == {"language": "de"}
    assert TYPES["keywords:existence"].arguments({"word": "sea"}) == {"keywords": ["sea"]}
    assert TYPES["combination:repeat_prompt"].arguments({}, "Why?") == {"prompt_to_repeat": "Why?"}
    assert set(COMMON_LANGUAGES) < set(LANGUAGES)
    with pytest.raises(TrimtabError, match="needs a value for n"):
        instruction_type("bullets").arguments({})
    with pytest.raises(TrimtabError, match="Klingon"):
        instruction_type("german").arguments({"language": "Klingon"})
    with pytest.raises(TrimtabError, match="no type of instructions 'song'"):
        instruction_type("song")
    with pytest.raises(TrimtabError, match="no parameter 'm'; parameters: n"):
        instruction_type("bullets").phrasings("learn", {"m": 3})


def test_lengths():
    for length in ("concise", "verbose"):
        assert len(set(length_phrasings(length))) >= 4
    with pytest.raises(KeyError):
        length_phrasings("middling")
