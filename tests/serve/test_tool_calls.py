"""Tools and formats over the API, on tiny models that call tools in the ways of several families."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="serving needs trimtab[serve]")
pytest.importorskip("llguidance", reason="grammars need trimtab[serve]")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve.toolbox import BARE, STRICT, TEMPLATES, WEATHER, check_call, model, service, steerings

from trimtab import Positions
from trimtab.serve.schema import ChatRequest

ASK = [{"role": "user", "content": "The weather in Lyon?"}]
CHATS = "/v1/chat/completions"
TOOLS = [WEATHER, BARE, STRICT]
KNOWN = [name for name in TEMPLATES if name != "unknown"]
JSON = {
    "type": "object",
    "properties": {"text": {"type": "string", "maxLength": 12}},
    "required": ["text"],
    "additionalProperties": False,
}
PUSHED: dict[str, Any] = {"steering": [{"name": "push", "strength": 20, "positions": "all"}]}


@pytest.fixture(scope="module")
def client_for(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """A client of a server whose model has this template."""
    from starlette.testclient import TestClient

    from trimtab.serve.app import make_app

    made: dict[str, Any] = {}

    def client(name: str) -> Any:
        if name not in made:
            folder = tmp_path_factory.mktemp("tools")
            lm = model(folder, name)
            served = service(lm, steerings(lm, folder / "steerings"))
            made[name] = TestClient(make_app(served), raise_server_exceptions=False).__enter__()
            made[name].service = served
        return made[name]

    yield client
    for opened in made.values():
        opened.__exit__(None, None, None)


def ask(client: Any, **more: Any) -> Any:
    body = {"model": "trimtab", "messages": ASK, "max_tokens": 160, "temperature": 0, **more}
    response = client.post(CHATS, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(client: Any, **more: Any) -> tuple[dict[str, Any], str]:
    """The message that a stream adds up to, and why it ended."""
    body = {"model": "trimtab", "messages": ASK, "max_tokens": 160, "temperature": 0, "stream": True, **more}
    message: dict[str, Any] = {"content": "", "calls": []}
    finish = ""
    for line in client.post(CHATS, json=body).text.splitlines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        for choice in json.loads(line[6:])["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            for name in ("role", "reasoning_content"):
                if name in delta:
                    message[name] = message.get(name, "") + delta[name]
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(message["calls"]):
                    assert call["id"].startswith("call_")
                    assert call["type"] == "function"
                    message["calls"].append({"name": call["function"]["name"], "arguments": ""})
                message["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            finish = choice["finish_reason"] or finish
    return message, finish


ANYHOW: dict[str, Any] = {
    "strength": st.floats(-100, 100, allow_nan=False),
    "positions": st.sampled_from([None, "all", "generated"]),
    "rejection": st.sampled_from([False, True]),
    "temperature": st.sampled_from([0, 1.0, 2.0]),
    "seed": st.integers(0, 50),
}
"""Steered as hard as a request may ask for, where it is by default and in the structured part itself."""


def anyhow(strength: float, positions: str | None, **more: Any) -> dict[str, Any]:
    place = {} if positions is None else {"positions": positions}
    return {"steering": [{"name": "push", "strength": strength, **place}], **more}


class TestCalls:
    @pytest.mark.parametrize("name", [name for name in KNOWN if name != "thinking"])
    @pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
    def test_calls_that_have_to_be(self, client_for: Callable[[str], Any], name: str, choice: Any) -> None:
        client = client_for(name)
        plain: dict[str, Any] = {}
        pushed, sampled = {**PUSHED, "rejection": name == "hermes"}, {"temperature": 1.5, "seed": 3}
        for more in (plain, pushed) if choice == "required" else (sampled,):
            body = {"tools": [WEATHER, STRICT], "tool_choice": choice, "parallel_tool_calls": False, **more}
            answer = ask(client, **body)
            message, finish = answer["choices"][0]["message"], answer["choices"][0]["finish_reason"]
            assert finish == "tool_calls"
            assert message["content"] is None
            (call,) = message["tool_calls"]
            check_call(call)
            if choice != "required":
                assert call["function"]["name"] == "get_weather"
            if "seed" in more or name in ("hermes", "mistral"):
                streamed_message, why = streamed(client, **body)
                assert streamed_message["calls"] == [call["function"]]
                assert (streamed_message["content"], why) == ("", "tool_calls")

    @pytest.mark.parametrize("name", ["hermes", "mistral", "mistral, with [ARGS]"])
    def test_several_calls_and_samples(self, client_for: Callable[[str], Any], name: str) -> None:
        body = {"tools": [WEATHER, STRICT], "tool_choice": "required", "temperature": 1, "seed": 1, "n": 5}
        answer = ask(client_for(name), **body)
        for choice in answer["choices"]:
            calls = choice["message"]["tool_calls"]
            for call in calls if choice["finish_reason"] == "tool_calls" else calls[:-1]:
                check_call(call)
        every = [call["id"] for choice in answer["choices"] for call in choice["message"]["tool_calls"]]
        assert len(set(every)) == len(every)

    @pytest.mark.parametrize("name", KNOWN)
    def test_calls_that_may_be(self, client_for: Callable[[str], Any], name: str) -> None:
        client = client_for(name)
        for choice in ("auto", None, "none"):
            answer = ask(client, tools=TOOLS, tool_choice=choice, max_tokens=20)
            message = answer["choices"][0]["message"]
            assert message.get("tool_calls") is None
            assert message["content"]
            streamed_message, why = streamed(client, tools=TOOLS, tool_choice=choice, max_tokens=20)
            assert (streamed_message["content"], why) == (message["content"], answer["choices"][0]["finish_reason"])
        without = ask(client, max_tokens=20)
        assert answer["usage"] == without["usage"]  # with "none" they aren't shown

    @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(name=st.sampled_from(["hermes", "mistral", "llama"]), how=st.fixed_dictionaries(ANYHOW))
    def test_calls_at_any_strength(self, client_for: Callable[[str], Any], name: str, how: dict[str, Any]) -> None:
        body = {"tools": [WEATHER, STRICT], "tool_choice": "required", "parallel_tool_calls": False}
        (choice,) = ask(client_for(name), **body, **anyhow(**how))["choices"]
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        check_call(call)

    def test_a_cut_off_call(self, client_for: Callable[[str], Any]) -> None:
        body = {"tools": [STRICT], "tool_choice": "required"}
        for name in ("hermes", "llama"):
            for most in (3, 42, 50):
                choice = ask(client_for(name), **body, max_tokens=most)["choices"][0]
                assert choice["finish_reason"] == "length"
                message, why = streamed(client_for(name), **body, max_tokens=most)
                assert why == "length"
                calls = choice["message"].get("tool_calls") or []
                assert message["calls"] == [call["function"] for call in calls]
                assert message["content"] == (choice["message"]["content"] or "")

    @pytest.mark.parametrize("name", KNOWN)
    def test_what_was_called_is_shown_to_the_model(self, client_for: Callable[[str], Any], name: str) -> None:
        call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
        talk = [
            *ASK,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "It snows."}]},
        ]
        served = client_for(name).service
        request = ChatRequest.model_validate({"model": "trimtab", "messages": talk, "tools": TOOLS})
        prepared = served.prepare(served.policy.caller(None), request)
        prompt = served.lm.tokenizer.decode(prepared.tasks[0].ids)
        for text in ("It snows.", "get_weather", "Oslo", "stop-it", "The weather in a city."):
            assert text in prompt or name == "thinking"
        talk[1] |= {"content": None, "refusal": None, "audio": None}  # as clients send it back
        answer = ask(client_for(name), messages=talk, tools=TOOLS, max_tokens=5)
        assert answer["usage"]["prompt_tokens"] == len(prepared.tasks[0].ids)
        assert ask(client_for(name), messages=talk, max_tokens=5)


class TestFormats:
    @settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(how=st.fixed_dictionaries(ANYHOW))
    def test_any_strength(self, client_for: Callable[[str], Any], how: dict[str, Any]) -> None:
        schema = {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 5},
                "mood": {"enum": ["calm", None]},
                "n": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2},
            },
            "required": ["name", "mood", "n"],
            "additionalProperties": False,
        }
        body = ask(
            client_for("hermes"),
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
            **anyhow(**how),
        )
        (choice,) = body["choices"]
        assert choice["finish_reason"] == "stop"
        answer = json.loads(choice["message"]["content"])
        assert answer.keys() == {"name", "mood", "n"}
        assert len(answer["name"]) <= 5
        assert answer["mood"] in ("calm", None)
        assert all(number in range(10) for number in answer["n"])
        assert len(answer["n"]) <= 2

    def test_objects_and_streams(self, client_for: Callable[[str], Any]) -> None:
        body = {"response_format": {"type": "json_object"}, "temperature": 1, "seed": 4, "max_tokens": 60}
        choice = ask(client_for("no tools"), **body)["choices"][0]
        assert choice["message"]["content"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)
        message, why = streamed(client_for("no tools"), **body)
        assert (message["content"], why) == (choice["message"]["content"], choice["finish_reason"])

    def test_with_tools_it_is_a_call_or_the_format(self, client_for: Callable[[str], Any]) -> None:
        format = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 7}}}
        for name in KNOWN:
            body = {"tools": [WEATHER], "response_format": format, "parallel_tool_calls": False}
            choice = ask(client_for(name), **body)["choices"][0]
            if name == "thinking" and choice["finish_reason"] == "length":
                continue  # it is still thinking
            if choice["finish_reason"] == "tool_calls":
                check_call(choice["message"]["tool_calls"][0])
            else:
                assert choice["message"]["content"] == "7"

    def test_what_isnt_held_to_is_told(self, client_for: Callable[[str], Any]) -> None:
        schema = {"type": "array", "uniqueItems": True, "maxItems": 1, "items": {"const": 1}}
        for strict, unheld in ((False, ["the schema 'x': Unimplemented keys: [\"uniqueItems\"]"]), (None, None)):
            named_schema = {"name": "x", "schema": schema, **({} if strict is None else {"strict": strict})}
            format = {"type": "json_schema", "json_schema": named_schema}
            body = {"messages": ASK, "model": "trimtab", "response_format": format}
            response = client_for("no tools").post(CHATS, json=body)
            if unheld is None:
                assert response.status_code == 400
                assert "a grammar can't enforce uniqueItems" in response.json()["error"]["message"]
                assert response.json()["error"]["param"] == "response_format.json_schema.schema"
            else:
                assert response.json()["trimtab"]["unheld"] == unheld


def test_thinking_is_kept_apart(client_for: Callable[[str], Any]) -> None:
    client = client_for("thinking")
    body = {"chat_template_kwargs": {"open": True}, "max_tokens": 15}
    message = ask(client, **body)["choices"][0]["message"]
    assert message["reasoning_content"]
    assert message["content"] == ""
    streamed_message, _ = streamed(client, **body)
    assert (streamed_message["reasoning_content"], streamed_message["content"]) == (message["reasoning_content"], "")
    plain = ask(client, max_tokens=15)["choices"][0]["message"]
    assert "reasoning_content" not in plain
    served = client.service
    replayed = [*ASK, {"role": "assistant", "content": "Sunny.", "reasoning_content": "Hm."}, *ASK]
    prepared = served.prepare(
        served.policy.caller(None), ChatRequest.model_validate({"model": "trimtab", "messages": replayed})
    )
    assert "<think>Hm.</think>Sunny." in served.lm.tokenizer.decode(prepared.tasks[0].ids)


def test_neighbours_dont_matter(client_for: Callable[[str], Any]) -> None:
    """Calls, formats and free text side by side are what they are alone."""
    client = client_for("hermes")
    ways: list[dict[str, Any]] = [
        {"max_tokens": 40},
        {"tools": [STRICT], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 90},
        {"response_format": {"type": "json_object"}, **PUSHED, "max_tokens": 40},
        {"max_tokens": 40, **PUSHED, "logprobs": True},
    ]
    alone = [ask(client, **way) for way in ways]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: ask(client, **ways[i % 4]), range(12)))
    for i, body in enumerate(together):
        choice_here, choice_alone = (answer["choices"][0] for answer in (body, alone[i % 4]))
        for choice in (choice_here, choice_alone):
            for call in choice["message"].get("tool_calls", ()):
                call.pop("id", None)
        assert choice_here["message"] == choice_alone["message"]
        assert choice_here["finish_reason"] == choice_alone["finish_reason"]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [WEATHER, WEATHER]}, "two tools named 'get_weather'", "tools.1.function.name"),
    ({"tool_choice": "required"}, "a call is required, but there are no tools", "tool_choice"),
    (
        {"tools": [BARE], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "there is no tool 'f'",
        "tool_choice.function.name",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
        "its parameters must be of type object",
        "tools.0.function.parameters.type",
    ),
    (
        {
            "tools": [
                BARE,
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": {"properties": {"a": {"type": "strin"}}}},
                },
            ]
        },
        "the tool 'f', at /properties/a: Invalid type: strin",
        "tools.1.function.parameters",
    ),
    (
        {"messages": [*ASK, {"role": "tool", "tool_call_id": "x", "content": "1"}]},
        "answer an earlier call of the assistant",
        "messages.1.tool_call_id",
    ),
    (
        {
            "messages": [
                *ASK,
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}],
                },
            ]
        },
        "arguments of a call must be a JSON object",
        "messages.1.tool_calls.0.function.arguments",
    ),
    ({"chat_template_kwargs": {"tools": []}}, "tools is a separate field", "chat_template_kwargs"),
]


@pytest.mark.parametrize(("more", "words", "param"), WRONG, ids=[words[:30] for _, words, _ in WRONG])
def test_what_is_refused(client_for: Callable[[str], Any], more: dict[str, Any], words: str, param: str) -> None:
    response = client_for("hermes").post(CHATS, json={"model": "trimtab", "messages": ASK, **more})
    assert response.status_code == 400
    error = response.json()["error"]
    assert words in error["message"]
    assert error["param"] == param


def test_an_unknown_form_is_refused(client_for: Callable[[str], Any]) -> None:
    body = {"model": "trimtab", "messages": ASK, "max_tokens": 3}
    response = client_for("unknown").post(CHATS, json={**body, "tools": [BARE]})
    assert response.status_code == 400
    assert "unknown format of tool calls" in response.json()["error"]["message"]
    assert client_for("unknown").post(CHATS, json={**body, "tools": [BARE], "tool_choice": "none"}).status_code == 200


class TestPositions:
    """A request's steerings act on words, and neither in calls nor in JSON, unless they say where."""

    def prepared(self, client: Any, **more: Any) -> Any:
        served = client.service
        request = ChatRequest.model_validate({"model": "trimtab", "messages": ASK, **more})
        return served.prepare(served.policy.caller(None), request)

    def positions(self, client: Any, **more: Any) -> list[str]:
        (task,) = self.prepared(client, **more).tasks
        return [str(edit.positions) for edit in task.steering.edits]

    def test_where_they_act(self, client_for: Callable[[str], Any]) -> None:
        push, own = {"name": "push", "strength": 20}, "from-last-prompt-token"
        for name, mark in (("hermes", "<tool_call>"), ("mistral", "[TOOL_CALLS]"), ("no tools", "<tool_call>")):
            client = client_for(name)
            (position,) = self.positions(client, steering=[push], tools=TOOLS)
            assert "outside-tools" in position
            assert mark in position
            assert self.positions(client, steering=[push]) == [own]
            assert self.positions(client, steering=[push], tools=TOOLS, tool_choice="none") == [own]
            for rule in ("all", "generated", "answer"):
                push_rule = [{**push, "positions": rule}]
                assert self.positions(client, steering=push_rule, tools=TOOLS) == [rule]
        begun = Positions.outside_tools(('{"name": "', ""))  # nothing opens a call in Llama's form but the call itself
        position = self.positions(client_for("llama"), steering=[push], tools=TOOLS)
        assert position == [f"{own} & ({Positions.prompt() | begun})"]
        must: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required"}
        assert self.positions(client_for("llama"), steering=[push], **must) == [f"{own} & prompt"]

    def test_json_is_that_of_the_prompt_alone(self, client_for: Callable[[str], Any]) -> None:
        """By default JSON is what it is with a steering of the prompt, and the response says so."""
        push = {"name": "push", "strength": 9}
        format = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": JSON}}}
        ways = [{}, {"positions": "last-prompt-token"}, {"positions": "from-last-prompt-token"}]
        answers = [ask(client_for("hermes"), steering=[{**push, **way}], **format) for way in ways]
        plain, prompt, everywhere = (answer["choices"][0]["message"]["content"] for answer in answers)
        assert plain == prompt
        assert plain != everywhere
        assert [answer["trimtab"]["steering"][0]["unsteered"] for answer in answers] == ["answer", None, None]
        assert [answer["trimtab"]["answers"][0]["doses"][0]["tokens"] > 1 for answer in answers] == [False, False, True]
        (thinks,) = self.positions(client_for("thinking"), steering=[push], **format)
        assert "thinking:<think>:</think>" in thinks
        nowhere = {"steering": [{**push, "positions": "generated & prompt"}]}
        assert ask(client_for("hermes"), **nowhere, **format)["trimtab"]["answers"][0]["doses"] == []

    def test_calls_are_those_of_the_prompt_alone(self, client_for: Callable[[str], Any]) -> None:
        """What is generated in a call isn't pushed: from its beginning on it is as if only the prompt had been."""
        client = client_for("hermes")
        body = {"tools": [STRICT], "tool_choice": "required", "parallel_tool_calls": False}
        ways: list[dict[str, Any]] = [
            {"steering": [{"name": "push", "strength": 8}]},
            {"steering": [{"name": "push", "strength": 8, "positions": "last-prompt-token"}]},
            {"steering": [{"name": "push", "strength": 8, "positions": "from-last-prompt-token"}]},
        ]
        # the marker's first tokens are pushed, which have no choice; the rest then differs by the cache alone
        outside, prompt, everywhere = (ask(client, **body, **way)["choices"][0]["message"] for way in ways)
        for message in (outside, prompt, everywhere):
            check_call(message["tool_calls"][0])
        doses = [ask(client, **body, **way)["trimtab"]["answers"][0]["doses"][0]["tokens"] for way in ways]
        assert doses[1] < doses[0] < doses[2]

    def test_a_rule_that_isnt_one(self, client_for: Callable[[str], Any]) -> None:
        body = {"model": "trimtab", "messages": ASK, "steering": [{"name": "push", "positions": "nowhere-at-all"}]}
        response = client_for("hermes").post(CHATS, json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "steering.0.positions"
