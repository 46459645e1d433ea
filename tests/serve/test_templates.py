"""What a chat request can say about its rendering: a begun answer, and keywords of the template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

PATH = "/v1/chat/completions"
USER, BEGUN = {"role": "user", "content": "The sea?"}, {"role": "assistant", "content": "It is"}
BODY: dict[str, Any] = {"model": "trimtab", "max_tokens": 5, "temperature": 0}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ mood or '' }}"
)


@pytest.fixture
def ask(
    tiny_lm: Any, make_service: Callable[..., Any], client_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    monkeypatch.setattr(tiny_lm.tokenizer, "chat_template", TEMPLATE)
    client = client_of(make_service())
    return lambda messages, **more: client.post(PATH, json={**BODY, "messages": messages, **more})


def said(response: Any) -> tuple[str, int]:
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


WAYS: dict[str, dict[str, Any]] = {
    "steered": {"steering": [{"name": "s0"}]},
    "rejecting": {"steering": [{"name": "s0"}], "rejection": {"ladder": "strength"}},
    "emphasized": {"emphasize": ["It is"], "rejection": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_begun_answer(ask: Any, tiny_lm: Any, steerings: Any, way: str) -> None:
    from trimtab import Rejection, load

    options: dict[str, Any] = {"max_new_tokens": 5}
    if way == "emphasized":
        options |= {"emphasize": "It is", "rejection": False}
    else:
        options |= {
            "steering": load(steerings / "s0.safetensors"),
            "rejection": way == "rejecting" and Rejection(ladder="strength"),
        }
    (goes_on,) = tiny_lm.generate([USER, BEGUN], **options)
    (anew,) = tiny_lm.generate([USER, BEGUN], template={"continue_final_message": False}, **options)
    messages = WAYS[way]
    assert said(ask([USER, BEGUN], continue_final_message=True, **messages)) == (goes_on.text, goes_on.prompt_tokens)
    both = {"continue_final_message": True, "add_generation_prompt": False}
    assert said(ask([USER, BEGUN], **both, **messages)) == (goes_on.text, goes_on.prompt_tokens)
    for more in ({}, {"continue_final_message": False}, {"add_generation_prompt": True}):
        assert said(ask([USER, BEGUN], **more, **messages)) == (anew.text, anew.prompt_tokens)
    assert anew.prompt_tokens > goes_on.prompt_tokens


def test_keywords_of_the_template(ask: Any, tiny_lm: Any) -> None:
    mood = {"mood": "blue blue"}
    (answer,) = tiny_lm.generate([USER], max_new_tokens=5, template=mood)
    (plain,) = tiny_lm.generate([USER], max_new_tokens=5)
    assert said(ask([USER], chat_template_kwargs=mood)) == (answer.text, answer.prompt_tokens)
    assert said(ask([USER], chat_template_kwargs={})) == said(ask([USER])) == (plain.text, plain.prompt_tokens)
    assert said(ask([USER], chat_template_kwargs=mood, emphasize=["blue"], rejection=False))[1] == answer.prompt_tokens


@pytest.mark.parametrize(
    ("messages", "more", "reason"),
    [
        ([USER], {"continue_final_message": True}, "the last one is the user's"),
        (
            [USER, BEGUN],
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt must be false",
        ),
        ([USER, BEGUN], {"add_generation_prompt": False}, "can only be false with continue_final_message: true"),
        ([USER, {**BEGUN, "content": ""}], {"continue_final_message": True}, "there is nothing to continue"),
        (
            [USER],
            {"chat_template_kwargs": {"moods": 1}},
            "doesn't use 'moods', so it would have no effect; it uses mood",
        ),
        ([USER], {"chat_template_kwargs": {"tokenize": False}}, "doesn't use 'tokenize'"),
        ([USER], {"chat_template_kwargs": {"continue_final_message": True}}, "is a separate field"),
    ],
)
def test_what_is_refused(ask: Any, messages: Any, more: dict[str, Any], reason: str) -> None:
    response = ask(messages, **more)
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]
