"""Requests that are wrong: quickly refused, in the API's own words; and such as ask for nothing more, accepted."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="serving needs trimtab[serve]")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimtab.serve.refusals import Refusal
from trimtab.serve.sieve import DEPTH, FIELDS, ITEMS, clean_json

ASK = [{"role": "user", "content": "The sea"}]
CHAT = {"model": "trimtab", "messages": ASK, "max_tokens": 2, "temperature": 0}
TEXT = {"model": "trimtab", "prompt": "The sea", "max_tokens": 2, "temperature": 0}
KIND = {"Content-Type": "application/json"}
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def client(tiny_lm: Any, steerings: Any) -> Any:
    """One server for all of them: they change nothing."""
    from starlette.testclient import TestClient

    from trimtab.serve.app import make_app
    from trimtab.serve.audit import Audit
    from trimtab.serve.library import read_folder
    from trimtab.serve.metrics import Metrics
    from trimtab.serve.policy import Policy
    from trimtab.serve.scheduler import Scheduler
    from trimtab.serve.service import Limits, Service

    limits, library = Limits(max_tokens=64), read_folder(tiny_lm, steerings)
    service = Service(
        tiny_lm, library, Scheduler(tiny_lm), Policy(), Audit(), Metrics(), limits, upload=True, learn=True
    )
    with TestClient(make_app(service), raise_server_exceptions=False) as opened:
        yield opened


def refused(client: Any, path: str, body: Any) -> str:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(path, content=data, headers=KIND)
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["message"])


MANY = 100_000
HOSTILE: dict[str, tuple[str, Any]] = {
    "parts": (CHATS, {**CHAT, "messages": [{"role": "user", "content": [{}] * MANY}]}),
    "messages": (CHATS, {**CHAT, "messages": [{}] * MANY}),
    "stops": (CHATS, {**CHAT, "stop": [1] * MANY}),
    "lists": (TEXTS, {**TEXT, "prompt": [[]] * MANY}),
    "truths": (TEXTS, {**TEXT, "prompt": [True] * MANY}),
    "metadata": (CHATS, {**CHAT, "metadata": {str(i): i for i in range(MANY)}}),
    "fields": (CHATS, {**CHAT, **{f"f{i}": i for i in range(MANY)}}),
    "inner fields": (CHATS, {**CHAT, "steering": [{f"f{i}": i for i in range(MANY)}]}),
    "template": (CHATS, {**CHAT, "chat_template_kwargs": {str(i): None for i in range(MANY)}}),
    "pairs": ("/v1/steerings", {"name": "x", "method": "caa", "pairs": [{"a": [{}] * 900}] * 500}),
    "pair fields": ("/v1/steerings", {"name": "x", "method": "caa", "pairs": [{str(i): 1 for i in range(60)}] * 500}),
    "layers": ("/v1/steerings", {"name": "x", "method": "caa", "pairs": [{"a": "b"}], "layers": [-1] * MANY}),
    "biases": (CHATS, {**CHAT, "logit_bias": {str(i): 1 for i in range(MANY)}}),
    "emphasize": (CHATS, {**CHAT, "emphasize": [{}] * MANY}),
    "wrong ids": (TEXTS, {**TEXT, "prompt": [-1] * MANY}),
    "many ids": (TEXTS, {**TEXT, "prompt": [[-1] * 1000] * 64}),
}


SHORTENED = ("metadata", "fields", "inner fields", "template", "biases", "pairs")
"""Too long for a body in one piece: cut, they aren't JSON any more."""


class TestShapes:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_errors_are_few_however_much_is_wrong(
        self, client: Any, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What takes time is one error for each wrong place: there are never more than a few hundred."""
        from trimtab.serve import app

        counts = []
        inner = app.validation_refusal

        def counted(errors: Any, body: Any) -> Any:
            counts.append(len(errors))
            return inner(errors, body)

        monkeypatch.setattr(app, "validation_refusal", counted)
        path, body = HOSTILE[name]
        data = json.dumps(body, separators=(",", ":")).encode()
        assert len(data) <= 1 << 20 or name in SHORTENED
        assert refused(client, path, data[: 1 << 20])
        assert sum(counts) <= 200

    @pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":['])
    @pytest.mark.parametrize("depth", [DEPTH + 2, 900, 100_000])
    def test_nesting(self, client: Any, opening: bytes, depth: int) -> None:
        close = {b"[": b"]", b'{"a":': b"}", b'[{"a":[': b"]}]"}[opening]
        for data in (opening * depth + b"1" + close * depth, opening * depth):
            assert refused(client, CHATS, data[: 1 << 20])

    def test_bounds_are_said(self) -> None:
        for body, words in (
            ({str(i): i for i in range(FIELDS + 1)}, f"at most {FIELDS} are allowed"),
            ({"a": {"b": ["x"] * (ITEMS + 1)}}, rf"a\.b has {ITEMS + 1} items"),
            ({"prompt": [1] * 100_000}, None),
        ):
            data = json.dumps(body).encode()
            if words is None:
                assert json.loads(clean_json(data)) == body
                continue
            with pytest.raises(Refusal, match=words):
                clean_json(data)

    @given(
        st.recursive(
            st.booleans()
            | st.integers(-(10**20), 10**20)
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(),
            lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
            max_leaves=12,
        )
    )
    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def test_what_holds_no_null_goes_through_as_it_is(self, value: Any) -> None:
        data = json.dumps(value).encode()
        assert json.loads(clean_json(data)) == value

    @given(st.binary(max_size=200))
    @settings(max_examples=300, deadline=None, derandomize=True)
    def test_bytes_are_read_or_refused(self, data: bytes) -> None:
        with suppress(Refusal):
            body = clean_json(data)
            assert body == data == b"" or json.loads(body) is not Ellipsis


WORDS: list[tuple[str, dict[str, Any], str]] = [
    (CHATS, {"steerng": []}, "steerng: this field isn't known; did you mean 'steering'?"),
    (CHATS, {"messages": None}, "messages: it is missing"),
    (CHATS, {"messages": []}, "messages: it must have at least 1 items"),
    (CHATS, {"messages": [{"role": "user"}]}, "messages.0: a message with the role user needs content"),
    (CHATS, {"messages": [{"role": "god", "content": "x"}]}, "messages.0.role: it must be 'system', 'developer'"),
    (
        CHATS,
        {"messages": [{"role": "user", "content": 5}]},
        "messages.0.content: it must be a string, or a list of text",
    ),
    (
        CHATS,
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "data": "x"}]}]},
        "messages.0.content.0: only text and images are supported",
    ),
    (CHATS, {"tools": [{"type": "function"}]}, "tools.0.function: it is missing"),
    (CHATS, {"tools": [{"type": "web_search"}]}, "tools.0.type: it must be 'function'"),
    (
        CHATS,
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools.0.function.name: a function's name has letters",
    ),
    (CHATS, {"tool_choice": "any"}, 'tool_choice: it must be "none", "auto", "required", or'),
    (CHATS, {"functions": [{"name": "f"}]}, "functions: functions have been replaced by tools"),
    (CHATS, {"guided_json": {}}, "guided_json: give response_format"),
    (CHATS, {"presence_penalty": 0.5}, "presence_penalty: penalties aren't supported; leave it out"),
    (CHATS, {"response_format": {"type": "xml"}}, 'response_format: it must be {"type": "text"}, {"type": "json_o'),
    (CHATS, {"response_format": {"type": "json_schema"}}, "response_format.json_schema: it is missing"),
    (CHATS, {"reasoning_effort": "high"}, "reasoning_effort: it isn't supported; set the chat template's own options"),
    (CHATS, {"top_k": 5}, "top_k: it isn't supported; use top_p, or temperature 0"),
    (CHATS, {"web_search_options": {}}, "web_search_options: web search isn't supported"),
    (CHATS, {"temperature": 3}, "temperature: it must be at most 2"),
    (CHATS, {"temperature": "0"}, "temperature: it must be a number"),
    (CHATS, {"stop": ["a"] * 5}, "stop: it can have at most 4 items"),
    (CHATS, {"stop": 5}, "stop: it must be a string, or up to 4 strings"),
    (CHATS, {"steering": [{"name": "s0", "strength": 101}]}, "steering.0.strength: it must be at most 100"),
    (CHATS, {"steering": [{"name": "s0", "stregth": 1}]}, "steering.0.stregth: this field isn't known; did you mean"),
    (CHATS, {"rejection": 5}, "rejection: it must be true, false, or an object"),
    (TEXTS, {"prompt": {}}, "prompt: it must be a string, a list of strings, or token ids"),
    (TEXTS, {"prompt": [1, "a"]}, "prompt"),
    (TEXTS, {"echo": True}, "echo: prompts aren't echoed"),
    (TEXTS, {"best_of": 4}, "best_of: it isn't supported; ask for n answers and choose"),
]


class TestWords:
    @pytest.mark.parametrize(("path", "more", "words"), WORDS, ids=[f"{next(iter(more))}" for _, more, _ in WORDS])
    def test_what_is_wrong_and_what_to_do(self, client: Any, path: str, more: dict[str, Any], words: str) -> None:
        message = refused(client, path, {**(CHAT if path == CHATS else TEXT), **more})
        assert message.startswith(words), message
        for theirs in ("constrained", "Input should", "List should", "pydantic", "Extra inputs"):
            assert theirs not in message

    @pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/moderations", "/nothing"])
    def test_routes_that_are_not_there(self, client: Any, path: str) -> None:
        response = client.post(path, json={"model": "trimtab", "input": "x"})
        assert response.status_code == 404
        assert "/v1/chat/completions" in response.json()["error"]["message"]

    def test_what_is_sent_as_something_else(self, client: Any) -> None:
        """As curl sends it unless told, and the other way round."""
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        sent = client.post("/v1/chat/completions", content=b'{"model": "trimtab"}', headers=form)
        assert "Content-Type: application/json" in sent.json()["error"]["message"]
        sent = client.put("/v1/steerings/x", json={})
        assert "Content-Type: application/octet-stream" in sent.json()["error"]["message"]

    @pytest.mark.parametrize("where", ["content", "field", "schema"])
    def test_half_a_character(self, client: Any, where: str) -> None:
        half = "a\ud800"
        more = {
            "content": {"messages": [{"role": "user", "content": half}]},
            "field": {half: 1},
            "schema": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"enum": [half]}}}]},
        }[where]
        sent = client.post("/v1/chat/completions", content=json.dumps({"model": "trimtab", **more}), headers=KIND)
        assert sent.status_code == 400
        assert "has an unpaired surrogate, \\ud800" in sent.json()["error"]["message"]

    def test_names_of_uploads(self, client: Any) -> None:
        response = client.put("/v1/steerings/-x", content=b"x", headers={"Content-Type": "application/octet-stream"})
        assert response.json()["error"]["message"].startswith("name: a steering's name has at most 64 letters, digits")


NOTHING: list[dict[str, Any]] = [
    {"functions": None, "function_call": None, "tools": None, "tool_choice": None, "audio": None, "anything": None},
    {"functions": [], "tools": [], "tool_choice": "none", "function_call": "none", "parallel_tool_calls": True},
    {"reasoning_effort": "none", "modalities": ["text"], "prompt_cache_retention": "24h", "verbosity": "medium"},
    {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "repetition_penalty": 1.0, "top_k": -1},
    {"min_p": 0, "ignore_eos": False, "skip_special_tokens": True, "length_penalty": 1, "store": True, "n": None},
    {"response_format": {"type": "text"}, "service_tier": "auto", "stream_options": None, "metadata": {"a": "b"}},
    {"steering": None, "emphasize": None, "rejection": None, "steering_extra": None},
]


class TestNothing:
    @pytest.mark.parametrize("more", NOTHING, ids=lambda more: next(iter(more)))
    def test_fields_that_ask_for_nothing(self, client: Any, more: dict[str, Any]) -> None:
        plain = client.post(CHATS, json=CHAT).json()["choices"]
        response = client.post(CHATS, json={**CHAT, **more})
        assert response.status_code == 200, response.text
        assert response.json()["choices"] == plain

    def test_an_answer_of_openais_sent_back(self, client: Any) -> None:
        """As `message.model_dump()` of OpenAI's client has it, and as other servers' answers do."""
        answer = {
            "role": "assistant", "content": "Blue.", "refusal": None, "annotations": [], "audio": None,
            "function_call": None, "tool_calls": None, "reasoning_content": None, "name": None, "parsed": None,
        }  # fmt: skip
        plain = {"role": "assistant", "content": "Blue."}
        texts = []
        for message in (answer, plain, {**answer, "tool_calls": [], "reasoning_content": ""}):
            response = client.post(CHATS, json={**CHAT, "messages": [*ASK, message, *ASK]})
            assert response.status_code == 200, response.text
            texts.append(
                (response.json()["choices"][0]["message"]["content"], response.json()["usage"]["prompt_tokens"])
            )
        assert len(set(texts)) == 1

    def test_an_assistant_that_said_nothing(self, client: Any) -> None:
        ways = [{"role": "assistant", "content": None}, {"role": "assistant", "content": ""}, {"role": "assistant"}]
        choices = [client.post(CHATS, json={**CHAT, "messages": [*ASK, way, *ASK]}).json()["choices"] for way in ways]
        assert choices[0] == choices[1] == choices[2]

    def test_openais_client_as_it_is(self, client: Any) -> None:
        openai = pytest.importorskip("openai")
        mine = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)
        completion = mine.chat.completions.create(**CHAT)
        again = mine.chat.completions.create(
            **{**CHAT, "messages": [*ASK, completion.choices[0].message.model_dump(), *ASK]}
        )
        assert again.choices[0].message.content is not None


def test_depth_is_far_from_pythons_own() -> None:
    assert sys.getrecursionlimit() > 20 * DEPTH


def test_every_unsupported_field_says_what_to_do() -> None:
    from trimtab.serve.fields import ALTERNATIVES, UnsupportedChat

    silent = {"store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    assert set(UnsupportedChat.model_fields) - silent <= set(ALTERNATIVES)
