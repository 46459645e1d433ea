"""The Responses API, read by OpenAI's own types: items, events in order, and what is sent back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="serving needs trimtab[serve]")
pytest.importorskip("llguidance", reason="grammars need trimtab[serve]")
openai = pytest.importorskip("openai")

from serve.toolbox import STRICT, WEATHER, model, service, steerings  # noqa: E402

PATH = "/v1/responses"
TOOL = {"type": "function", **WEATHER["function"]}
NOTE = {"type": "function", **STRICT["function"]}
ASK: dict[str, Any] = {"model": "trimtab", "input": "The sea?", "max_output_tokens": 20, "temperature": 0}
CALL: dict[str, Any] = {**ASK, "tools": [NOTE], "tool_choice": "required", "parallel_tool_calls": False}
CALL["max_output_tokens"] = 120


@pytest.fixture(scope="module")
def client_for(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    from starlette.testclient import TestClient

    from trimtab.serve.app import make_app

    made: dict[str, Any] = {}

    def client(name: str) -> Any:
        if name not in made:
            folder = tmp_path_factory.mktemp("responses")
            lm = model(folder, name)
            served = service(lm, steerings(lm, folder / "steerings"))
            made[name] = TestClient(make_app(served), raise_server_exceptions=False).__enter__()
            made[name].service = served
        return made[name]

    yield client
    for opened in made.values():
        opened.__exit__(None, None, None)


def mine(client: Any) -> Any:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)


def checked(response: Any) -> Any:
    """Every field is what OpenAI's types have, and not only something like it."""
    type(response).model_validate(json.loads(response.model_dump_json(by_alias=True)))
    return response


def test_it_answers_as_the_chat_does(client_for: Callable[[str], Any]) -> None:
    client = client_for("hermes")
    pushed = {"steering": [{"name": "push", "strength": 3}]}
    response = checked(mine(client).responses.create(**ASK, instructions="Be brief.", extra_body=pushed))
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The sea?"}]
    body = {"model": "trimtab", "messages": talk, "max_tokens": 20, "temperature": 0, **pushed}
    chat = client.post("/v1/chat/completions", json=body).json()
    assert response.output_text == chat["choices"][0]["message"]["content"]
    assert response.status == ("incomplete" if chat["choices"][0]["finish_reason"] == "length" else "completed")
    assert response.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert response.usage.output_tokens == chat["usage"]["completion_tokens"]
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    applied = response.model_extra["trimtab"]
    assert applied["steering"] == chat["trimtab"]["steering"]
    assert response.instructions == "Be brief."


def test_a_call_and_its_output(client_for: Callable[[str], Any]) -> None:
    client = mine(client_for("hermes"))
    response = checked(client.responses.create(**CALL))
    (call,) = response.output
    assert (call.type, call.name, response.status) == ("function_call", "note", "completed")
    assert json.loads(call.arguments).keys() == {"text"}
    again = [
        {"role": "user", "content": "The sea?"},
        *[item.model_dump() for item in response.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"},
    ]
    after = checked(client.responses.create(**{**ASK, "input": again}, tools=[NOTE], tool_choice="none"))
    assert after.output_text
    named = client.responses.create(
        **{**CALL, "tools": [NOTE, TOOL], "tool_choice": {"type": "function", "name": "get_weather"}}
    )
    assert named.output[0].name == "get_weather"


def test_a_format(client_for: Callable[[str], Any]) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    format = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    body = {**ASK, "max_output_tokens": 80, "text": {"format": format}}
    response = checked(mine(client_for("hermes")).responses.create(**body))
    assert json.loads(response.output_text)["n"] in (1, 2)
    assert response.text.format.schema_ == schema


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("hermes", ASK),
        ("hermes", CALL),
        ("mistral, with [ARGS]", CALL),
        ("thinking", {**ASK, "extra_body": {"chat_template_kwargs": {"open": True}}}),
        ("hermes", {**CALL, "max_output_tokens": 45}),
    ],
)
def test_events_in_order(client_for: Callable[[str], Any], name: str, body: dict[str, Any]) -> None:
    """Each item and part is opened, told, and closed with all that was told; the last event is the whole response."""
    client = mine(client_for(name))
    whole = client.responses.create(**body)
    events = list(client.responses.create(**body, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == f"response.{whole.status}"
    last = checked(events[-1].response)
    open_item: Any = None
    texts: list[str] = []
    for event in events[2:-1]:
        checked(event)
        if event.type == "response.output_item.added":
            assert open_item is None
            open_item = event.item.id
            assert event.output_index == len(texts)
            assert event.item.status == "in_progress"
            texts.append("")
        elif event.type == "response.output_item.done":
            assert event.item.id == open_item
            assert event.item == last.output[event.output_index]
            open_item = None
        else:
            assert event.item_id == open_item
            assert event.output_index == len(texts) - 1
            if event.type.endswith(".delta"):
                texts[-1] += event.delta
            elif event.type.endswith("_text.done"):
                assert event.text == texts[-1]
            elif event.type.endswith("arguments.done"):
                assert event.arguments == texts[-1]
    assert open_item is None
    for item, whole_item in zip(last.output, whole.output, strict=True):
        assert item.type == whole_item.type
        assert item.status == whole_item.status
        said = item.arguments if item.type == "function_call" else item.content[0].text
        assert said == (whole_item.arguments if item.type == "function_call" else whole_item.content[0].text)
    assert last.usage == whole.usage


def test_thinking_is_an_item(client_for: Callable[[str], Any]) -> None:
    client = mine(client_for("thinking"))
    response = checked(client.responses.create(**ASK, extra_body={"chat_template_kwargs": {"open": True}}))
    assert [item.type for item in response.output] == ["reasoning"]
    assert response.usage.output_tokens_details.reasoning_tokens == 20
    again = [
        {"role": "user", "content": "Hi"},
        *[item.model_dump() for item in response.output],
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Why?"},
    ]
    from trimtab.serve.responses import as_chat
    from trimtab.serve.schema_responses import ResponsesRequest
    from trimtab.serve.sieve import clean_json

    body = json.loads(clean_json(json.dumps({"model": "trimtab", "input": again}).encode()))
    messages = as_chat(ResponsesRequest.model_validate(body)).messages
    assert [message.role for message in messages] == ["user", "assistant", "user"]
    assert messages[1].reasoning_content == response.output[0].content[0].text
    assert messages[1].content == "Blue."
    assert client.responses.create(**{**ASK, "input": again}).output_text


def text_of(logprobs: Any) -> str:
    """What tokens say together; some are parts of a character."""
    return b"".join(bytes(logprob.bytes) for logprob in logprobs).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("name", "more", "parts"),
    [
        ("hermes", {}, ["message"]),
        ("hermes", {"tools": [NOTE], "tool_choice": "required", "max_output_tokens": 60}, ["function_call"]),
        ("thinking", {"extra_body": {"chat_template_kwargs": {"open": True}}}, ["reasoning"]),
    ],
    ids=["words", "a call", "thinking"],
)
def test_logprobs_are_those_of_the_text(
    client_for: Callable[[str], Any], name: str, more: dict[str, Any], parts: list[str]
) -> None:
    """They are the chat's, token for token, make up the text, and stand in the deltas that they belong to."""
    client = client_for(name)
    fields = {**ASK, "include": ["message.output_text.logprobs"], "top_logprobs": 3, **more}
    response = checked(mine(client).responses.create(**fields))
    assert [item.type for item in response.output] == parts
    events = list(mine(client).responses.create(**fields, stream=True))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    if parts != ["message"]:
        assert not deltas
        assert "logprobs" not in response.output[0].model_dump_json()
        return
    logprobs = response.output[0].content[0].logprobs
    assert text_of(logprobs) == response.output_text
    body = {"model": "trimtab", "messages": [{"role": "user", "content": ASK["input"]}], "temperature": 0}
    body |= {"max_tokens": ASK["max_output_tokens"], "logprobs": True, "top_logprobs": 3}
    chat = client.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert [logprob.model_dump() for logprob in logprobs] == chat[: len(logprobs)]
    assert all(len(logprob.top_logprobs) == 3 for logprob in logprobs)
    assert [logprob.token for event in deltas for logprob in event.logprobs] == [logprob.token for logprob in logprobs]
    assert all(text_of(event.logprobs) == event.delta for event in deltas)
    (done,) = (event for event in events if event.type == "response.output_text.done")
    assert [logprob.token for logprob in done.logprobs] == [logprob.token for logprob in logprobs]
    again = [{"role": "user", "content": "Hi"}, *[item.model_dump() for item in response.output]]
    assert mine(client).responses.create(**{**ASK, "input": [*again, {"role": "user", "content": "Why?"}]}).output_text


def test_logprobs_of_words_after_thinking(client_for: Callable[[str], Any]) -> None:
    """Markers, blanks around them and what ends an answer are no part of the text."""
    from trimtab.serve.responses_logprobs import TextTokens
    from trimtab.serve.tasks import GeneratedToken
    from trimtab.text.answer_parts import AnswerMarkers, AnswerSplitter, AnswerText

    tokenizer = client_for("thinking").service.lm.tokenizer
    reading, tokens = (
        AnswerSplitter(AnswerMarkers(thinking=("<think>", "</think>"), thinking_open=True)),
        TextTokens(tokenizer),
    )
    ids = [*tokenizer.encode("Hmm.</think>\n\nThe sea is <b", add_special_tokens=False), tokenizer.eos_token_id]
    said, logprobs = "", []
    for i, id in enumerate(ids):
        last = i == len(ids) - 1
        parts = reading.finish() if last else reading.add(tokenizer.decode([id]))
        said += "".join(part.text for part in parts if isinstance(part, AnswerText))
        logprobs += tokens.take(parts, [GeneratedToken(id, -1.0)])
    assert said == "The sea is <b"
    assert "".join(logprob.token for logprob in logprobs) == said


NOTHING: list[dict[str, Any]] = [
    {"store": True, "metadata": {"a": "b"}, "user": "me", "previous_response_id": None, "include": []},
    {"truncation": "disabled", "background": False, "service_tier": "auto", "reasoning": {"effort": None}},
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "text": {"format": {"type": "text"}}},
    {"include": ["reasoning.encrypted_content"], "prompt_cache_key": "x", "top_logprobs": 0},
]


@pytest.mark.parametrize("more", NOTHING, ids=lambda more: next(iter(more)))
def test_fields_that_ask_for_nothing(client_for: Callable[[str], Any], more: dict[str, Any]) -> None:
    client = client_for("hermes")
    response = client.post(PATH, json={**ASK, **more})
    assert response.status_code == 200, response.text
    plain = client.post(PATH, json=ASK).json()
    assert response.json()["output"][0]["content"] == plain["output"][0]["content"]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"previous_response_id": "resp_1"}, "nothing is stored; send the whole conversation", "previous_response_id"),
    ({"conversation": "c"}, "nothing is stored", "conversation"),
    ({"background": True}, "nothing is stored; wait", "background"),
    ({"truncation": "auto"}, "prompts aren't truncated", "truncation"),
    ({"input": []}, "at least 1", "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "item", "input.0"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        "it is missing",
        "input.0.content.0.image_url",
    ),
    ({"input": [{"type": "function_call_output", "call_id": "x", "output": "1"}]}, "answer an earlier call", "input"),
    ({"tools": [{"type": "web_search"}]}, "'function'", "tools.0.type"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "there is no tool 'f'", "tool_choice.name"),
    (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "strin"}}}},
        "Invalid type: strin",
        "text.format.schema",
    ),
    ({"max_output_tokens": 100_000}, "on this server", "max_output_tokens"),
    ({"reasoning": {"effort": "high"}}, "chat_template_kwargs", "reasoning"),
    ({"steering": [{"name": "nobody"}]}, "there is no steering 'nobody'", "steering.0.name"),
    ({"inputs": "x"}, "did you mean 'input'", "inputs"),
    ({"top_logprobs": 2}, "needs include: ['message.output_text.logprobs']", "top_logprobs"),
    ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "20", "top_logprobs"),
]


@pytest.mark.parametrize(("more", "words", "param"), WRONG, ids=[next(iter(more)) for more, _, _ in WRONG])
def test_what_is_refused(client_for: Callable[[str], Any], more: dict[str, Any], words: str, param: str) -> None:
    response = client_for("hermes").post(PATH, json={**ASK, **more})
    assert response.status_code in (400, 404), response.text
    error = response.json()["error"]
    assert words in error["message"]
    assert error["param"].startswith(param)
