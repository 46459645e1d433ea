"""An idea that a model writes out: another one over HTTP, or a loaded one."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from judging import serving

from trimtab import LM, TrimtabError
from trimtab.evaluate.judge import Endpoint
from trimtab.making import idea_from_writer, writer
from trimtab.making.writer import TRIES

openai = pytest.mark.skipif(find_spec("openai") is None, reason="needs trimtab[judge]")
TEMPLATE = "{% for m in messages %}w71 {{ m.content }} {% endfor %}w72"
WRITTEN = {
    "name": "salty",
    "positive": [f"You are salty, {n}." for n in range(5)],
    "negative": [f"You are sweet, {n}." for n in range(5)],
    "questions": [f"What about {n}?" for n in range(40)],
}


@openai
def test_what_is_written_is_the_idea() -> None:
    with serving() as served:
        served.reply = lambda _: (
            f"<think>They want {{something}}.</think>\nHere it is:\n```json\n{json.dumps(WRITTEN)}\n```"
        )
        idea = idea_from_writer(Endpoint(served.url, "m", retries=0), " be salty ")
    assert "be salty" in served.requests[0]["messages"][0]["content"]
    assert (idea.name, idea.source) == ("salty", "writer be salty")
    assert (list(idea.positive), list(idea.negative)) == (WRITTEN["positive"], WRITTEN["negative"])
    assert [*idea.learn, *idea.test] == WRITTEN["questions"]
    assert len(idea.learn) == len(idea.test) == 20


@openai
def test_what_cannot_be_used_is_asked_for_again() -> None:
    replies = ["Sorry.", json.dumps({**WRITTEN, "positive": "You are salty."}), json.dumps(WRITTEN)]
    with serving() as served:
        served.reply = lambda _: replies.pop(0)
        assert idea_from_writer(Endpoint(served.url, "m", retries=0), "be salty").name == "salty"
    first, *others = (request["messages"][0]["content"] for request in served.requests)
    assert [other.removeprefix(first).strip() for other in others] == [
        "An earlier reply of yours couldn't be used: it isn't a JSON object.",
        "An earlier reply of yours couldn't be used: its 'positive' isn't a list of texts.",
    ]


@openai
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
        with pytest.raises(TrimtabError, match=f"{words}.*; leave the writer out, and .* or have a larger model write"):
            idea_from_writer(Endpoint(served.url, "m", retries=0), "be salty")
    assert len(served.requests) == TRIES


# ---- a loaded model --------------------------------------------------------------------------------------------


@pytest.fixture
def lm() -> LM:
    lm = tiny.tiny("llama")
    lm.tokenizer.chat_template = TEMPLATE
    lm.layout = replace(lm.layout, context=2000)
    return lm


def test_a_loaded_model_writes_unsteered_as_far_as_its_context_allows(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[Any, dict[str, Any]]] = []
    replies = ["Sorry.", f"Here it is: {json.dumps(WRITTEN)} Enjoy!"]

    def generate(prompts: Any, *args: Any, **options: Any) -> list[Any]:
        assert not args
        requests.extend((prompt, options) for prompt in prompts)
        return [SimpleNamespace(text=replies.pop(0))]

    monkeypatch.setattr(lm, "generate", generate)
    idea = idea_from_writer(lm, "be salty")
    assert (idea.name, list(idea.positive)) == ("salty", WRITTEN["positive"])
    assert len(requests) == 2
    for prompt, options in requests:
        assert "be salty" in prompt[0]["content"]
        assert options == {"max_new_tokens": 2000 - len(lm.encode(prompt))}
    assert requests[1][0][0]["content"].endswith("couldn't be used: it isn't a JSON object.")


def test_a_loaded_model_that_does_not_manage_it(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_TOKENS", 4)
    with pytest.raises(TrimtabError, match=r"unusable 3 times: it isn't a JSON object; leave the writer out"):
        idea_from_writer(lm, "be salty")


def test_a_loaded_model_that_can_not_be_asked(lm: LM) -> None:
    lm.layout = replace(lm.layout, context=600)
    with pytest.raises(TrimtabError, match=r"holds 600 tokens: too few for the request of \d+, .*another model write"):
        idea_from_writer(lm, "be salty")
    lm.tokenizer.chat_template = None
    with pytest.raises(TrimtabError, match=r"has no chat template, so it can't be asked .* leave the writer out"):
        idea_from_writer(lm, "be salty")
