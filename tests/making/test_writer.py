"""An idea that another model writes out, over HTTP."""

from __future__ import annotations

import json

import pytest
from judging import serving

from trimtab import TrimtabError
from trimtab.evaluate.judge import Endpoint
from trimtab.making.writer import TRIES, idea_from_writer

pytest.importorskip("openai", reason="needs trimtab[judge]")
WRITTEN = {
    "name": "salty",
    "positive": [f"You are salty, {n}." for n in range(5)],
    "negative": [f"You are sweet, {n}." for n in range(5)],
    "questions": [f"What about {n}?" for n in range(40)],
}


def test_what_is_written_is_the_idea() -> None:
    with serving() as served:
        served.reply = lambda _: f"Here it is:\n```json\n{json.dumps(WRITTEN)}\n```"
        idea = idea_from_writer(Endpoint(served.url, "m", retries=0), " be salty ")
    assert "be salty" in served.requests[0]["messages"][0]["content"]
    assert (idea.name, idea.source) == ("salty", "writer be salty")
    assert (list(idea.positive), list(idea.negative)) == (WRITTEN["positive"], WRITTEN["negative"])
    assert [*idea.learn, *idea.test] == WRITTEN["questions"]
    assert len(idea.learn) == len(idea.test) == 20


def test_what_cannot_be_used_is_asked_for_again() -> None:
    replies = ["Sorry.", json.dumps({**WRITTEN, "positive": "You are salty."}), json.dumps(WRITTEN)]
    with serving() as served:
        served.reply = lambda _: replies.pop(0)
        assert idea_from_writer(Endpoint(served.url, "m", retries=0), "be salty").name == "salty"
    assert len(served.requests) == 3


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("no", "unusable 3 times: it isn't a JSON object"),
        ("[1]", "it isn't a JSON object"),
        (json.dumps({**WRITTEN, "questions": []}), "its 'questions' isn't a list of texts"),
        (json.dumps({**WRITTEN, "questions": ["Why?"] * 40}), "at least 8 and 4 are needed"),
    ],
)
def test_after_three_tries_it_is_an_error(reply: str, words: str) -> None:
    with serving() as served:
        served.reply = lambda _: reply
        with pytest.raises(TrimtabError, match=words):
            idea_from_writer(Endpoint(served.url, "m", retries=0), "be salty")
    assert len(served.requests) == TRIES
