"""From words to system prompts for and against."""

from __future__ import annotations

import pytest

from trimtab import TrimtabError
from trimtab.data import queries
from trimtab.making.idea import PLAIN, Idea, idea_from_contrast, idea_from_sentence, with_questions

QUESTIONS = tuple(f"Question {n}?" for n in range(24))


def test_a_trait_card_is_found_by_a_sentence() -> None:
    idea = idea_from_sentence("Please talk like a pirate!")
    assert (idea.name, idea.source) == ("pirate", "trait pirate")
    assert len(idea.positive) == len(idea.negative) == 5
    assert not set(idea.learn) & set(idea.test)


def test_without_cards_the_sentence_itself_is_told() -> None:
    idea = idea_from_sentence("talk like a pirate", cards=False)
    assert idea.source == "sentence"
    assert all("talk like a pirate" in prompt.lower() for prompt in idea.positive)
    assert len(set(idea.positive)) == len(idea.positive)
    assert idea.negative == PLAIN
    assert set(idea.learn) <= set(queries("learn"))
    assert set(idea.test) <= set(queries("test"))


@pytest.mark.parametrize(
    ("said", "wanted", "other"),
    [
        ("be terse, not wordy", "be terse", "be wordy"),
        ("write like a lawyer rather than like a friend", "write like a lawyer", "write like a friend"),
        ("terse, never wordy", "be terse", "be wordy"),
        ("sound sure of yourself and not be full of doubt", "sound sure of yourself", "be full of doubt"),
    ],
)
def test_the_opposite_stands_after_not(said: str, wanted: str, other: str) -> None:
    idea = idea_from_sentence(said, cards=False)
    assert all(wanted in prompt.lower() and other not in prompt.lower() for prompt in idea.positive)
    assert all(other in prompt.lower() and wanted not in prompt.lower() for prompt in idea.negative)


def test_a_persona_and_another() -> None:
    idea = idea_from_contrast(" a tired poet. ", "an office clerk")
    assert idea.name == "a tired poet"
    assert all("a tired poet" in prompt for prompt in idea.positive)
    assert all("an office clerk" in prompt for prompt in idea.negative)
    assert idea_from_contrast("a tired poet").negative == PLAIN


def test_questions_of_ones_own() -> None:
    idea = with_questions(idea_from_contrast("a poet"), QUESTIONS)
    assert (idea.learn, idea.test) == (QUESTIONS[::2], QUESTIONS[1::2])
    with pytest.raises(TrimtabError, match=r"has 2 questions to learn from and 2 to test; at least 8 and 4"):
        with_questions(idea, QUESTIONS[:4])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: idea_from_sentence(" . "), "describe in a sentence what you want"),
        (lambda: idea_from_contrast("  "), "say who the model should be like"),
        (lambda: idea_from_contrast("a poet", " a poet."), "like and unlike are the same: 'a poet'"),
        (lambda: Idea("x", (), ("b",), QUESTIONS[:8], QUESTIONS[8:]), "'x' needs system prompts for it and against it"),
        (lambda: Idea("x", ("a",), ("b",), QUESTIONS[:8], QUESTIONS[7:]), "is also one to learn from: 'Question 7"),
    ],
)
def test_errors(call: object, words: str) -> None:
    with pytest.raises(TrimtabError, match=words):
        call()  # type: ignore[operator]
