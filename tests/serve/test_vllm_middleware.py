"""What the door sees to that trimtab's own server hasn't to: vLLM's routes, its streams, and its engine behind it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from serve.pretend_vllm import ANSWERING, UNKNOWN
from starlette.responses import JSONResponse

from trimtab.engines.vllm.request_context import REQUEST_CONTEXT
from trimtab.engines.vllm.wire import wire_of
from trimtab.errors import TrimtabError
from trimtab.files.steering_file import load_steering
from trimtab.serve.audit import Audit
from trimtab.serve.vllm import middleware as module
from trimtab.serve.vllm.middleware import SteeringMiddleware, check
from trimtab.serve.vllm.request import parse_request
from trimtab.serve.vllm.settings import MiddlewareSettings
from trimtab.steering import ScaleScores, by_keys, emphasis
from trimtab.text.spans import Part as TalkPart
from trimtab.text.spans import Phrase

CHAT, TEXT, RESPONSES = ANSWERING
ASK: dict[str, Any] = {"model": "trimtab", "messages": [{"role": "user", "content": "Why?"}], "temperature": 0}
STEERED = {**ASK, "steering": [{"name": "s0", "strength": 0.5}]}
KEYED = {"keys": [{"name": "ann", "sha256": hashlib.sha256(b"ann").hexdigest()}], "always": [{"name": "s7"}]}
KEY = {"Authorization": "Bearer ann"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(text: str) -> list[Any]:
    """The data of a stream's events."""
    parts = [part.partition("data: ")[2] for part in text.split("\n\n") if "data: " in part]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]


@pytest.fixture
def closed(door_of: Callable[..., Any], tmp_path: Path) -> Any:
    """A client of a server with a policy, and its audit log."""
    return door_of(KEYED, tmp_path, audit=str(tmp_path / "a.jsonl")), tmp_path / "a.jsonl"


class TestClosed:
    def test_other_routes_that_generate_arent_there(self, closed: Any) -> None:
        client, _ = closed
        for path in (*UNKNOWN, "/v1/chat/completions/", "/V1/completions", "/v1/load_lora_adapter", "/collective_rpc"):
            assert client.post(path, json=ASK, headers=KEY).status_code == 404, path
        assert client.app.state.engine.received == []
        for method, path in (("GET", "/v1/models"), ("POST", "/tokenize"), ("GET", "/metrics")):
            assert client.request(method, path, headers=KEY).status_code == 200, path
            assert client.request(method, path).status_code == 401, path

    def test_the_engine_takes_nothing_past_the_door(self, closed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Should a route that generates be taken for one that doesn't, it gets an error and no token."""
        client, log = closed
        monkeypatch.setitem(module.FORWARDED_ROUTES, "POST", UNKNOWN)
        response = client.post(UNKNOWN[0], json=ASK, headers=KEY)
        assert (response.status_code, client.app.state.engine.received) == (400, [])
        assert "which doesn't cover this route" in response.text
        assert [entry["event"] for entry in lines(log)] == ["refused"]

    def test_nothing_is_read_of_who_has_no_key(self, closed: Any) -> None:
        client, _ = closed
        sent: list[Any] = []

        async def receive() -> Any:
            raise AssertionError("the body was asked for")

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"host", b"x")], "query_string": b""}
        asyncio.run(client.app(scope, receive, send))
        assert sent[0]["status"] == 401
        asyncio.run(client.app({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send))
        assert sent[-1]["type"] == "websocket.close"

    def test_bodies_are_bounded(self, door_of: Callable[..., Any], tmp_path: Path) -> None:
        client = door_of(KEYED, tmp_path, body=2000)
        assert client.post(CHAT, json={**ASK, "user": "x" * 3000}, headers=KEY).status_code == 413

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            ({"background": True}, "background"),
            ({"previous_response_id": "resp_1"}, "aren't tied to a key"),
            ({"use_beam_search": True}, "beam search"),
            ({"emphasize": ["Why"]}, "ask for rejection: false"),
            ({"emphasize": ["Why"], "rejection": False}, "TRIMTAB_SITES=keys"),
            ({"emphasize": [{"text": "Why", "at": 1}], "rejection": False}, "emphasize"),
            ({"emphasize": ["Why"], "rejection": False, "vllm_xargs": {"emphasize": "Why"}}, "give it once"),
            ({"emphasize": ["Why"], "rejection": False, "use_beam_search": True}, "beam search"),
            ({"emphasize": ["when"], "rejection": False}, "isn't in the prompt"),
            ({"emphasize": [{"role": "system"}], "rejection": False}, "no system message"),
            ({"monitors": ["harm"]}, "monitors"),
            ({"clean_cache": True}, "cache"),
            ({"vllm_xargs": {"trimtab": "[]"}}, "only the server sets"),
            ({"steering": "s0", "vllm_xargs": {"steering": "s0"}}, "give it once"),
            ({"vllm_xargs": {"steering": '[{"name": "s7"}]'}}, "always on"),
            ({"steering": [{"name": "s0", "strenth": 1}]}, "strength"),
            ({"steering": [{"name": "s0", "strength": "1"}]}, "a number"),
            ({"steering": "[{"}, "isn't valid JSON"),
            ({"steering": 5}, "a list"),
        ],
    )
    def test_what_cant_be_had(self, closed: Any, more: dict[str, Any], words: str) -> None:
        client, log = closed
        response = client.post(CHAT, json={**ASK, **more}, headers=KEY)
        assert response.status_code in (400, 403)
        assert words in response.json()["error"]["message"]
        assert client.app.state.engine.received == []
        assert lines(log)[-1]["event"] == "refused"


class TestAnswers:
    @pytest.mark.parametrize("stream", [False, True])
    def test_the_line_is_there_before_the_engine_is(self, closed: Any, stream: bool) -> None:
        client, log = closed

        class Looking(list):
            """What the engine was given; and what stood in the log by then."""

            def append(self, request: Any) -> None:
                super().append([entry["event"] for entry in lines(log)])

        client.app.state.engine.received = Looking()
        assert client.post(CHAT, json={**STEERED, "stream": stream}, headers=KEY).status_code == 200
        assert client.app.state.engine.received == [["begun"]]
        assert [entry["event"] for entry in lines(log)] == ["begun", "ended"]

    def test_a_stream_tells_it_last(self, closed: Any) -> None:
        client, log = closed
        whole = client.post(CHAT, json=STEERED, headers=KEY).json()
        chunks = events(client.post(CHAT, json={**STEERED, "stream": True}, headers=KEY).text)
        assert chunks[-1] == "[DONE]"
        assert chunks[-2]["trimtab"] == whole["trimtab"]
        assert (chunks[-2]["choices"], chunks[-2]["id"]) == ([], chunks[0]["id"])
        assert (
            "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-2])
            == (whole["choices"][0]["message"]["content"])
        )
        always, wanted = whole["trimtab"]["steering"]
        assert (always["name"], always["always"], wanted["name"], wanted["strength"]) == ("s7", True, "s0", 0.5)
        (each,) = whole["trimtab"]["answers"]
        assert (len(each["edits"]), each["dose"], each["doses"]) == (2, None, [])
        first, second = (entry for entry in lines(log) if entry["event"] == "ended")
        assert first["tokens"] == second["tokens"] == [5]
        assert first["prompt_tokens"] == second["prompt_tokens"]
        assert first["request"] in whole["id"]

    def test_the_responses_api(self, closed: Any) -> None:
        """Its first event comes before the engine has the request, and is held back until it has."""
        client, log = closed
        body = {"model": "trimtab", "input": "Why?", "stream": True}
        events_sent = events(client.post(RESPONSES, json=body, headers=KEY).text)
        assert [event["type"] for event in events_sent] == ["response.created", "response.completed"]
        assert events_sent[-1]["response"]["trimtab"]["steering"][0]["name"] == "s7"
        assert [entry["event"] for entry in lines(log)] == ["begun", "ended"]

    @pytest.mark.parametrize("stream", [False, True])
    def test_an_error_before_the_first_token_has_its_status(self, closed: Any, stream: bool) -> None:
        client, log = closed
        body = {**ASK, "stream": stream, "steering": [{"name": "s0", "layer": 99}]}
        assert client.post(CHAT, json=body, headers=KEY).status_code == 400
        client.app.state.engine.generate = _broken
        assert client.post(CHAT, json={**ASK, "stream": stream}, headers=KEY).status_code == 500
        assert [(entry["event"], entry["status"]) for entry in lines(log)] == [("refused", 400), ("refused", 500)]
        assert lines(log)[-1]["error"] == "it is broken"

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_dose_above_the_cap(self, door_of: Callable[..., Any], tmp_path: Path, stream: bool) -> None:
        client = door_of({"max_dose": 0.2}, tmp_path, audit=str(tmp_path / "a.jsonl"))
        assert client.post(CHAT, json={**STEERED, "stream": stream}).status_code == 200
        wild = {**ASK, "steering": [{"name": "s0", "strength": 50}], "stream": stream}
        response = client.post(CHAT, json=wild)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "dose_too_high")
        assert response.json()["error"]["message"].startswith("the doses of all sites add up to")
        assert [entry.get("outcome") for entry in lines(tmp_path / "a.jsonl")][1::2] == ["done", "dose_too_high"]

    def test_a_dose_above_the_cap_after_some_tokens(self, door_of: Callable[..., Any], tmp_path: Path) -> None:
        client = door_of({"max_dose": 0.2}, tmp_path, audit=str(tmp_path / "a.jsonl"))
        client.app.state.engine.late = True
        response = client.post(CHAT, json={**ASK, "steering": [{"name": "s0", "strength": 50}], "stream": True})
        *said, error, done = events(response.text)
        assert (response.status_code, len(said), done) == (200, 6, "[DONE]")
        assert error["error"]["code"] == "dose_too_high"
        _, ended = lines(tmp_path / "a.jsonl")
        assert (ended["outcome"], ended["tokens"]) == ("dose_too_high", [5])

    @pytest.mark.parametrize("stream", [False, True])
    def test_phrases_are_emphasized_by_their_keys(
        self, door_of: Callable[..., Any], tmp_path: Path, tiny_lm: Any, steerings: Path, stream: bool
    ) -> None:
        """As the same scores are scaled by the transformers engine; what is capped doesn't count it."""
        client = door_of({"max_dose": 5.0}, tmp_path, audit=str(tmp_path / "a.jsonl"))
        client.app.state.engine._trimtab_link.inside = {"keys": 16}
        talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why so? Why not?"}]
        wanted: list[Any] = [{"text": "Why", "occurrence": 1}, {"role": "system"}]
        body = {**STEERED, "messages": talk, "emphasize": wanted, "rejection": False}
        spans = tiny_lm.spans(talk, [Phrase("Why", 1), TalkPart("system")])
        heeded = emphasis(ScaleScores(), spans, range(4), "directer")
        count = sum(stop - start for start, stop in spans)
        both = 0.5 * load_steering(steerings / "s0.safetensors") + by_keys(heeded)
        (right,) = tiny_lm.generate(talk, both, max_new_tokens=5)
        answer = client.post(CHAT, json={**body, "stream": stream})
        assert answer.status_code == 200, answer.text
        if stream:
            *chunks, last, _ = events(answer.text)
            text, report = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks), last["trimtab"]
        else:
            text, report = answer.json()["choices"][0]["message"]["content"], answer.json()["trimtab"]
        assert text == right.text
        assert report["emphasized_tokens"] == count
        (applied,) = report["answers"]
        assert applied["edits"][-4:] == [str(edit) for edit in heeded.edits]
        (pushed,) = (dose for dose in right.applied.doses if dose.kind == "residual")
        assert applied["doses"] == [asdict(pushed)]
        assert applied["total_dose"] == applied["dose"] == pushed.ratio
        begun, ended = lines(tmp_path / "a.jsonl")
        assert begun["emphasized_tokens"] == ended["emphasized_tokens"] == count
        assert ended["total_doses"] == [pushed.ratio]
        assert len({wire_of(params).parts[1].digest for params in client.app.state.engine.received}) == 1

    @pytest.mark.parametrize("stream", [False, True])
    def test_nothing_is_answered_unaudited(self, closed: Any, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
        """Neither where the log is in trouble already, nor where its first line is what fails."""
        client, _ = closed
        monkeypatch.setattr(Audit, "_append", _full)
        for _ in range(2):
            response = client.post(CHAT, json={**ASK, "stream": stream}, headers=KEY)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "unaudited")
        assert client.app.state.engine.received == []
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200

    def test_who_goes_is_written_down_as_gone(self, closed: Any) -> None:
        """vLLM ends a request whose client has gone, and answers nothing: `null`, that is."""
        client, log = closed
        sent: list[Any] = []
        coming = [{"type": "http.request", "body": json.dumps(ASK).encode()}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return coming.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        async def left(scope: Any, receive: Any, send: Any) -> None:
            await REQUEST_CONTEXT.get().start()
            while (await receive())["type"] != "http.disconnect":
                pass
            await JSONResponse(None)(scope, receive, send)

        door = client.app.middleware_stack.app
        door.app = left
        headers = [(b"host", b"x"), (b"authorization", b"Bearer ann")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
        asyncio.run(door(scope, receive, send))
        assert [(entry["event"], entry.get("outcome")) for entry in lines(log)] == [
            ("begun", None),
            ("ended", "cancelled"),
        ]
        assert sent == []
        assert REQUEST_CONTEXT.get() is None

    def test_an_answer_of_which_the_engine_knows_nothing(self, closed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        client, _ = closed
        monkeypatch.setattr(module, "GENERATE", (*ANSWERING, "/tokenize"))
        response = client.post("/tokenize", json=ASK, headers=KEY)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "unsteered")


def _full(_self: Audit, _data: bytes) -> None:
    from trimtab.serve.audit import unaudited

    _self.trouble = "no space"
    raise unaudited()


async def _broken(*_arguments: Any, **_more: Any) -> Any:
    from serve.pretend_vllm import Broken

    raise Broken("it is broken")
    yield


class TestOpen:
    def test_without_rules_vllm_is_as_it_was_but_tells_what_steered(
        self, door_of: Callable[..., Any], tmp_path: Path
    ) -> None:
        client = door_of(None, tmp_path)
        plain, steered = (client.post(TEXT, json={"model": "trimtab", "prompt": "Why?", **more}).json() for more in (
            {}, {"vllm_xargs": {"steering": '{"name": "s0", "strength": 9}'}}
        ))  # fmt: skip
        assert plain["choices"] != steered["choices"]
        assert plain["trimtab"]["steering"] == []
        assert steered["trimtab"]["steering"][0]["strength"] == 9
        assert client.post(UNKNOWN[0], json=ASK).status_code == 200
        assert client.get("/trimtab").json()["layers"] == 4

    def test_who_changes_steerings_stands_in_the_log(self, closed: Any, steerings: Path) -> None:
        client, log = closed
        data, admin = (steerings / "s0.safetensors").read_bytes(), {"Authorization": "Bearer admin"}
        assert client.put("/trimtab/steerings/new", content=data, headers=admin).status_code == 200
        assert client.put("/trimtab/steerings/new", content=data, headers=KEY).status_code == 401
        assert client.delete("/trimtab/steerings/new", headers=admin).status_code == 200
        for method in ("PUT", "DELETE"):
            response = client.request(method, "/trimtab/steerings/s7", content=data, headers=admin)
            assert (response.status_code, "is always on" in response.text) == (400, True)
        assert [(entry["event"], entry.get("added") or entry.get("removed")) for entry in lines(log)] == [
            ("added", "new"),
            ("removed", "new"),
        ]


class TestBeforeItStarts:
    @pytest.mark.parametrize(
        ("policy", "words"),
        [
            ({"monitors": [{"name": "harm"}]}, "the monitor 'harm'"),
            ({"always": [{"name": "s99"}]}, "'s99'"),
            ({"kyes": []}, "kyes"),
        ],
    )
    def test_a_policy_that_cant_hold(self, policy: Any, words: str, tmp_path: Path, steerings: Path) -> None:
        from trimtab.engines.vllm.frontend import Names

        (tmp_path / "p.json").write_text(json.dumps(policy))
        names = Names()
        names.load(steerings)
        with pytest.raises(TrimtabError, match=words):
            check(MiddlewareSettings(policy=str(tmp_path / "p.json")), names)

    def test_an_engine_that_lets_others_in_or_measures_nothing(self, closed: Any, tmp_path: Path) -> None:
        client, _ = closed
        state, failed = client.app.state, []

        async def send(message: Any) -> None:
            failed.append(message)

        async def receive() -> Any:
            return {"type": "lifespan.startup"}

        def start(**options: Any) -> str:
            made = SteeringMiddleware(
                client.app, MiddlewareSettings(**options), SteeringMiddleware.__init__.__defaults__[1]
            )
            asyncio.run(made({"type": "lifespan", "app": client.app}, receive, send))
            return str(failed[-1]["message"])

        state.trimtab_engine._trimtab_link.unmeasured = "graphs"
        assert "can't be measured here: graphs" in start(max_dose=1.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRIMTAB_CLOSED")
            assert "would accept requests that bypass them" in start(max_dose=1.0)
        with pytest.raises(TrimtabError, match="TRIMTAB_DOOR isn't set"):
            SteeringMiddleware(client.app)


def test_what_vllm_is_given() -> None:
    body = {**STEERED, "vllm_xargs": {"other": 1}, "rejection": False, "logit_bias": {"5": 1.0}}
    request = parse_request(json.dumps(body).encode(), closed=True)
    assert json.loads(request.body) == {**ASK, "vllm_xargs": {"other": 1}, "logit_bias": {"5": 1.0}}
    assert [(steering.name, steering.strength) for steering in request.steering] == [("s0", 0.5)]
