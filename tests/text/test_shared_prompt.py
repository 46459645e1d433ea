"""What both sides of a pair have in common: a prompt, and a system prompt only if it is the same."""

from __future__ import annotations

import pytest

from trimtab.text.pairs import Pair, Side, pairs_from_rows, sides
from trimtab.text.shared_prompt import prompt_of, shared_side, with_system_apart


def said(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def shared(pair: Pair) -> Side:
    return shared_side(*map(with_system_apart, sides(pair)))


CHEERFUL, GLOOMY, ASKED = ("system", "Be cheerful."), ("system", "Be gloomy."), ("user", "How are you?")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"positive": "Hooray!", "negative": "Alas.", "prompt": "How?"}, "How?"),
        (
            {"positive": "Hooray!", "negative": "Alas.", "prompt": "How?", "system": "Be brief."},
            said(("system", "Be brief."), ("user", "How?")),
        ),
        ({"positive": "Hooray!", "negative": "Alas.", "prompt": "How?", "positive_system": "Be cheerful."}, "How?"),
        (
            {
                "positive": said(CHEERFUL, ASKED, ("assistant", "Hooray!")),
                "negative": said(GLOOMY, ASKED, ("assistant", "Alas.")),
            },
            said(ASKED),
        ),
        (
            {
                "positive": said(CHEERFUL, ASKED, ("assistant", "Hooray!")),
                "negative": said(CHEERFUL, ASKED, ("assistant", "Alas.")),
            },
            said(CHEERFUL, ASKED),
        ),
        (
            {
                "positive": said(("user", "How are you? Be cheerful."), ("assistant", "Hooray!")),
                "negative": said(ASKED, ("assistant", "Alas.")),
            },
            said(ASKED),
        ),
    ],
)
def test_a_prompt_with_what_both_sides_have(row, prompt):
    (pair,) = pairs_from_rows([row])
    side = shared(pair)
    assert prompt_of(side) == prompt
    assert side.answer == ""
