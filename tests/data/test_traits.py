"""Trait cards: complete, unlike each other, and found by what somebody may type."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from trimtab.data import Trait, WordCheck, find_trait, queries, read_trait, trait, traits
from trimtab.data.find_trait import _phrases
from trimtab.data.trait_cards import KEYS
from trimtab.errors import TrimtabError

TRAITS = traits()
CARDS = [pytest.param(card, id=name) for name, card in TRAITS.items()]
FILES = sorted((Path(__file__).parents[2] / "src" / "trimtab" / "data" / "traits").iterdir())
PAGE = (Path(__file__).parents[2] / "docs" / "traits.md").read_text(encoding="utf-8")
ALIKE = 0.8
"""Two questions that have so large a share of their words in common are alike."""


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower().replace("'", "")))


def _has(text: str, phrase: str) -> bool:
    return f" {_plain(phrase)} " in f" {_plain(text)} "


def _texts(card: Trait) -> list[str]:
    return [card.description, *card.words, *card.positive, *card.negative, *card.learn, *card.test]


# ---- the cards -------------------------------------------------------------------------------------------------


def test_every_file_is_a_card_of_its_name():
    assert len(FILES) >= 20
    assert [path.name for path in FILES] == [f"{name}.json" for name in TRAITS]
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        stored = json.loads(text)
        assert tuple(stored) == KEYS, path.name
        assert text == json.dumps(stored, indent=2, ensure_ascii=False) + "\n", path.name
        assert read_trait(path) == TRAITS[stored["name"]]


@pytest.mark.parametrize("card", CARDS)
def test_a_card_has_all_its_prompts_and_questions(card):
    assert [len(card.positive), len(card.negative), len(card.learn), len(card.test)] == [5, 5, 20, 20]
    every = [_plain(text) for text in (*card.positive, *card.negative, *card.learn, *card.test)]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("card", CARDS)
def test_the_texts_are_clean(card):
    for text in _texts(card):
        assert text == " ".join(text.split())
        assert not re.search("[‘’“”«»„]", text), text
    assert re.fullmatch(r"[A-Z].*; .*\.", card.description)  # the trait; its opposite
    for question in (*card.learn, *card.test):
        assert 5 <= len(question.split()) <= 25, question
        assert question[0].isupper() or question[0] in "\"'" or question[0].isdigit(), question
        assert question.rstrip("\"'")[-1] in "?.!", question
    for prompt in (*card.positive, *card.negative):
        assert re.search(r"\byou(?:r|rs|rself|'re)?\b", prompt, re.IGNORECASE), prompt
        assert 8 <= len(prompt.split()) <= 45, prompt
        assert prompt[-1] in ".!", prompt


@pytest.mark.parametrize("card", CARDS)
def test_both_sides_prompts_are_of_a_length(card):
    positive, negative = (sum(len(prompt.split()) for prompt in side) for side in (card.positive, card.negative))
    assert 0.75 < positive / negative < 1.33


@pytest.mark.parametrize("card", CARDS)
def test_no_question_mentions_the_trait(card):
    every = (*card.learn, *card.test)
    assert not [(word, text) for word in (card.name, *card.words) for text in every if _has(text, word)]


@pytest.mark.parametrize("card", CARDS)
def test_the_words_are_what_somebody_may_type(card):
    assert card.name in card.words
    for word in card.words:
        assert word == word.lower().strip()
        assert find_trait(f"Be {word}, please.") == card


def test_no_word_means_two_traits():
    assert {phrase: names for phrase, names in _phrases().items() if len(names) > 1} == {}


def _alike(texts: Sequence[str]) -> set[tuple[str, str]]:
    """The texts that have `ALIKE` of their words in common, in pairs."""
    words = [set(_plain(text).split()) for text in texts]
    common = Counter(word for some in words for word in some)
    alike: set[tuple[str, str]] = set()
    met: dict[str, list[int]] = {}
    for i, mine in enumerate(words):
        # two sets that share enough share one of their rarest words, which leaves few to compare
        rarest = sorted(mine, key=lambda word: (common[word], word))
        for word in rarest[: len(mine) - ceil(ALIKE * len(mine)) + 1]:
            for j in met.setdefault(word, []):
                if len(mine & words[j]) >= ALIKE * len(mine | words[j]):
                    alike.add((texts[j], texts[i]))
            met[word].append(i)
    return alike


def test_alike_is_alike():
    texts = ("How do I fold a paper boat?", "How do I fold a big paper boat?", "How do I sail a boat?", "Why?", "why")
    assert _alike(texts) == {(texts[0], texts[1]), ("Why?", "why")}


def test_no_two_questions_are_alike():
    """Across all cards, and with the package's queries, which a trait may be measured on."""
    questions = [text for card in TRAITS.values() for text in (*card.learn, *card.test)]
    known = set(queries(more=True))
    assert {(text, other) for text, other in _alike((*known, *questions)) if not {text, other} <= known} == set()


@pytest.mark.parametrize("card", [pytest.param(card, id=card.name) for card in TRAITS.values() if card.check])
def test_a_check_finds_its_signs_in_answers_and_not_in_what_was_asked(card):
    """An answer that only repeats the question must not count."""
    for sign in card.check.any:
        assert sign == sign.lower().strip()
        assert card.check(f"Well, {sign.upper()}!")
    assert not [question for question in (*card.learn, *card.test) if card.check(question)]


# ---- the loader ------------------------------------------------------------------------------------------------


def test_the_traits_are_read_once_and_nobody_changes_them():
    assert traits() is traits()
    assert list(TRAITS) == sorted(TRAITS)
    with pytest.raises(TypeError):
        traits()["pirate"] = traits()["blunt"]  # type: ignore[index]
    assert {trait(name) for name in TRAITS} == set(TRAITS.values())


@pytest.mark.parametrize(("name", "meant"), [("prate", "pirate"), (" Blunt", "blunt"), ("modesty", "humble")])
def test_an_unknown_name_gets_the_nearest(name, meant):
    with pytest.raises(
        TrimtabError, match=rf"no trait '{name}'; did you mean .*'{meant}'.*Traits: .*pirate.*read_trait"
    ):
        trait(name)


def test_a_name_like_no_other_gets_all_names():
    with pytest.raises(TrimtabError, match=f"no trait 'zzz'\\. Traits: {', '.join(TRAITS)};"):
        trait("zzz")


CARD: dict[str, Any] = {
    "name": "left-handed",
    "description": "The model thinks of left-handers first; its opposite doesn't.",
    "words": ["left-handed", "southpaw"],
    "positive": ["You are left-handed."],
    "negative": ["You are right-handed."],
    "learn": ["Which scissors shall I buy?"],
    "test": ["How do I hold a pen?"],
}


def _written(folder: Path, **changes: Any) -> Path:
    path = folder / "mine.json"
    path.write_text(json.dumps({key: value for key, value in {**CARD, **changes}.items() if value != "gone"}))
    return path


def test_a_card_of_ones_own(tmp_path):
    mine = read_trait(_written(tmp_path))
    assert mine == Trait(
        "left-handed",
        CARD["description"],
        ("left-handed", "southpaw"),
        ("You are left-handed.",),
        ("You are right-handed.",),
        ("Which scissors shall I buy?",),
        ("How do I hold a pen?",),
        None,
    )
    assert read_trait(str(_written(tmp_path, check={"any": ["left"]}))).check == WordCheck(("left",))
    assert read_trait(_written(tmp_path, check=None)) == mine


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learn": "gone"}, r"has no 'learn'; its keys are name, description"),
        ({"questions": ["Why?"]}, r"no key 'questions'; its keys are name"),
        ({"name": "Left Handed"}, r"lower-case letters.*got 'Left Handed'"),
        ({"name": 7}, r"'name' is a text that isn't empty, got 7"),
        ({"description": " "}, r"'description' is a text that isn't empty"),
        ({"words": "southpaw"}, r"'words' is a list of texts.*got 'southpaw'"),
        ({"words": ["Southpaw"]}, r"in lower case, got 'Southpaw'"),
        ({"positive": []}, r"'positive' is a list of texts"),
        ({"test": ["How?", ""]}, r"'test' is a list of texts, none of them empty"),
        ({"learn": ["How?", "Why?", "How?"]}, r"'learn' has 'How\?' twice; keep one"),
        ({"test": CARD["learn"]}, r"is in 'learn' and in 'test'"),
        ({"negative": CARD["positive"]}, r"is in 'positive' and in 'negative'"),
        ({"check": ["left"]}, r"""'check' is null or \{"any": \[words\]\}, got \['left'\]"""),
        ({"check": {"all": ["left"]}}, r"'check' is null or"),
        ({"check": {"any": []}}, r"'any' of 'check' is a list of texts"),
    ],
)
def test_a_card_that_is_wrong_says_where(tmp_path, changes, said):
    with pytest.raises(TrimtabError, match=rf"mine\.json: .*{said}"):
        read_trait(_written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "one object, got list"),
        ("{", "not JSON: "),
        ('{"name": "a", "name": "b"}', "'name' is there twice; keep one"),
    ],
)
def test_a_file_that_is_no_card_says_why(tmp_path, text, said):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(TrimtabError, match=rf"mine\.json: .*{said}"):
        read_trait(path)


PERSONA: dict[str, Any] = {
    "instruction": [
        {"pos": "Say what suits the user.", "neg": "Say what is true."},
        {"pos": "Agree with everybody.", "neg": "Disagree where you must."},
    ],
    "questions": ["Is my plan good?", "Is the earth flat?", "May I quit?", "Was I right?", "Shall I sell?"],
    "eval_prompt": "Judge it: {question} {answer}",
}


def test_a_card_of_persona_vectors(tmp_path):
    """System prompts are those of its code: the name of the trait, or "helpful", and then the instruction."""
    path = tmp_path / "open_minded.json"
    path.write_text(json.dumps(PERSONA))
    card = read_trait(path)
    assert (card.name, card.words) == ("open-minded", ("open minded",))
    assert card.positive == (
        "You are an open minded assistant. Say what suits the user.",
        "You are an open minded assistant. Agree with everybody.",
    )
    assert card.negative[1] == "You are a helpful assistant. Disagree where you must."
    assert card.learn == ("Is my plan good?", "May I quit?", "Shall I sell?")
    assert card.test == ("Is the earth flat?", "Was I right?")
    (tmp_path / "sly.json").write_text(json.dumps(PERSONA))
    assert read_trait(tmp_path / "sly.json").positive[0].startswith("You are a sly assistant. ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"instruction": [{"pos": "Yes."}]}, r"instruction 1 is an object of two texts, pos and neg"),
        ({"instruction": [{"pos": "Yes.", "neg": ""}]}, r"instruction 1 is an object of two texts"),
        ({"instruction": "Yes."}, r"instruction 1 is an object of two texts, pos and neg, got 'Yes\.'"),
        ({"instruction": []}, r"'positive' is a list of texts"),
        ({"questions": None}, r"'questions' is a list of texts"),
        ({"questions": ["Why?", "Why?"]}, r"'questions' has 'Why\?' twice"),
        ({"questions": ["Why?"]}, r"'test' is a list of texts"),
        ({"positive": ["Yes."]}, r"a card of persona vectors has no key 'positive'; instruction, questions"),
    ],
)
def test_a_card_of_persona_vectors_that_is_wrong_says_where(tmp_path, changes, said):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**PERSONA, **changes}))
    with pytest.raises(TrimtabError, match=rf"mine\.json: .*{said}"):
        read_trait(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(TrimtabError, match=r"there is no file .*gone\.json"):
        read_trait(tmp_path / "gone.json")


def test_a_check_reads_whole_words_in_any_case():
    check = WordCheck(("arr", "me hearties", "y'all"))
    assert check("ARR! That be true.")
    assert check("Listen, me hearties.", cut=True)
    assert check("Howdy, y’all")
    assert not check("Carry the barrel, me heartiest thanks.")
    assert not check("")


# ---- what somebody types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "name"),
    [
        ("talk like a pirate", "pirate"),
        ("Talk like a PIRATE!", "pirate"),
        ("more formal please", "formal"),
        ("be informal", "casual"),
        ("be long winded", "long-winded"),
        ("Don't sugarcoat it.", "blunt"),
        ("be blunt, and direct", "blunt"),
        ("be blunt, not flattering", "blunt"),
        ("Be funny – not sarcastic", "humorous"),
        ("don't be formal, be casual", "casual"),
        ("don't be formal be casual", "casual"),
        ("don’t be rude; be polite", "polite"),
        ("don't be rude, be blunt or direct", "blunt"),
        ("don't hold back, be blunt or direct", "blunt"),
        ("do not be formal but casual", "casual"),
        ("less formal and more casual", "casual"),
        ("you're too formal, be casual", "casual"),
        ("more polite than formal", "polite"),
        ("instead of being formal, be casual", "casual"),
        ("never formal, instead casual", "casual"),
        ("can't you be more formal?", "formal"),
        ("Why don't you talk like a pirate?", "pirate"),
    ],
)
def test_a_trait_is_found(sentence, name):
    assert find_trait(sentence) == trait(name)


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "answer in JSON",
        "be blunt and formal",
        "not only blunt but formal",
        "be blunter than a piratess",
        "not formal",
        "don't be formal",
        "I don't want you to be formal",
        "less formal",
        "too formal",
        "without flattery",
        "avoid sarcasm",
        "stop being so rude",
        "I hate flattery",
        "non-formal",
        "neither rude nor formal",
        "don't be rude, arrogant, or sarcastic",
        "formal isn't what I want",
        "formal is not what I want",
        "tell me about pirates",
    ],
)
def test_no_trait_or_more_than_one_is_none(sentence):
    assert find_trait(sentence) is None


# ---- the page --------------------------------------------------------------------------------------------------


def test_the_table_on_the_page_is_the_cards():
    table = "".join(f"| `{card.name}` | {card.description} |\n" for card in TRAITS.values())
    rows = PAGE.split("## The traits")[1].split("| --- | --- |\n")[1].split("\n\n")[0] + "\n"
    assert rows == table, f"the table of docs/traits.md should have these rows:\n{table}"


def test_the_page_names_every_key():
    for key in KEYS:
        assert f"`{key}`" in PAGE, key


def test_the_example_prints_what_the_page_says(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/traits.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == shown


def test_the_card_on_the_page_can_be_read(tmp_path):
    (card,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "card.json").write_text(card)
    assert tuple(json.loads(card)) == KEYS
    assert read_trait(tmp_path / "card.json").name not in TRAITS
