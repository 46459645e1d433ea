"""What a teacher is told, in every way that there is, and what can't be."""

from __future__ import annotations

import pytest

from trimtab import TrimtabError
from trimtab.learn.teachers import Teacher

ONE = "Answer in French."
SHOT = (("What is two plus two?", "Quatre."), ("Who wrote Hamlet?", "Shakespeare."))


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_an_instruction_stands_behind_the_query() -> None:
    assert Teacher((ONE,)).ask("Why?", 0) == f"Why? {ONE}"
    assert Teacher((ONE,), times=3).ask("Why?", 0) == f"Why? {ONE} {ONE} {ONE}"


def test_phrasings_take_turns() -> None:
    teacher = Teacher(("a", "b", "c"), times=2)
    assert teacher.phrasing_count == 3
    assert [teacher.ask("q", turn) for turn in range(5)] == ["q a a", "q b b", "q c c", "q a a a", "q b b b"]


def test_it_is_said_in_other_ways() -> None:
    """First in other words, then once more often."""
    teacher = Teacher(("a", "b", "c"))
    assert [teacher.ask("q", turn) for turn in teacher.prompt_variants(2)] == ["q a", "q b", "q a a", "q b b"]
    assert teacher.prompt_variants(9) == [0, 1, 2, 3, 4, 5]
    assert Teacher(system="s").prompt_variants(4) == [0]


def test_a_system_message_goes_beside_the_prompt() -> None:
    teacher = Teacher(system="Be brief.")
    assert (teacher.ask("Why?", 0), teacher.system, teacher.phrasing_count) == ("Why?", "Be brief.", 1)


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("A poem of the sea.", "A poem of the sea.\n\nWhy?"),
        ("A poem.\n\n", "A poem.\n\nWhy?"),
        ("A poem. {query} Be quick.", "A poem. Why? Be quick."),
        ("{query} And again: {query}", "Why? And again: Why?"),
        ("Braces {} and {0} stay. {query}", "Braces {} and {0} stay. Why?"),
    ],
)
def test_a_text_stands_in_front_or_around(text: str, prompt: str) -> None:
    assert Teacher(text=text).ask("Why?", 0) == prompt


def test_a_query_is_never_taken_for_a_hole() -> None:
    assert Teacher(text="In front.").ask("What is {query}?", 0) == "In front.\n\nWhat is {query}?"
    assert Teacher(text="Around {query}.").ask("What is {query}?", 0) == "Around What is {query}?."


def test_examples_are_earlier_turns() -> None:
    messages = Teacher(examples=SHOT).ask("Why?", 0)
    assert messages == [
        user(SHOT[0][0]),
        {"role": "assistant", "content": SHOT[0][1]},
        user(SHOT[1][0]),
        {"role": "assistant", "content": SHOT[1][1]},
        user("Why?"),
    ]


def test_all_at_once() -> None:
    teacher = Teacher((ONE,), system="Be brief.", text="A poem. {query}", examples=SHOT[:1])
    messages = teacher.ask("Why?", 0)
    assert isinstance(messages, list)
    assert messages[-1] == user(f"A poem. Why? {ONE}")
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    "options",
    [
        {"instruction": ("",)},
        {"instruction": (ONE, " \n")},
        {"system": ""},
        {"text": "  "},
        {"examples": (("q", " "),)},
        {"examples": (("", "a"),)},
        {"system": "Be brief.", "text": ""},
    ],
)
def test_what_is_said_is_not_empty(options: dict) -> None:
    with pytest.raises(TrimtabError, match="is empty"):
        Teacher(**options)


def test_something_is_said() -> None:
    with pytest.raises(TrimtabError, match="needs an instruction, a system message, a text or examples"):
        Teacher()
    with pytest.raises(TrimtabError, match="1 or more times, got 0"):
        Teacher((ONE,), times=0)
