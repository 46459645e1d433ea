"""The routes in this process: what the policy allows, what is malformed, and the OpenAPI document."""

from __future__ import annotations

import gc
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serve.conftest import NAMES

from trimtab.serve.audit import Audit
from trimtab.serve.policy import Policy, read_policy

ASK = [{"role": "user", "content": "The sea is wide and blue."}]
BODY: dict[str, Any] = {"model": "trimtab", "messages": ASK, "max_tokens": 5, "temperature": 0}
PATH = "/v1/chat/completions"


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


RULES = {
    "keys": [
        {"name": "alice", "sha256": hashlib.sha256(b"alice").hexdigest(), "steerings": ["s0"], "strength": [0, 2]},
        {"name": "bob", "sha256": hashlib.sha256(b"bob").hexdigest(), "add": True},
    ],
    "always": [{"name": "s7", "strength": 1}],
    "strength": [-3, 3],
}


class Asks:
    """A client of a server with these rules."""

    @pytest.fixture
    def own(self, make_service: Callable[..., Any], client_of: Callable[..., Any], tmp_path: Path) -> Any:
        """Of trimtab's own server."""
        self.log = tmp_path / "audit.jsonl"
        (tmp_path / "policy.json").write_text(json.dumps(RULES))
        policy, audit = read_policy(tmp_path / "policy.json"), Audit(self.log, prompts=True)
        return client_of(make_service(policy=policy, audit=audit, upload=True, learn=True))

    def ask(self, client: Any, who: str, **more: Any) -> Any:
        return client.post(PATH, json={**BODY, **more}, headers=bearer(who))


class TestPolicy(Asks):
    """What holds of trimtab's own server, and of vLLM's behind the door."""

    @pytest.fixture(params=["transformers", "vllm"])
    def client(self, request: Any, tmp_path: Path) -> Any:
        self.vllm = request.param == "vllm"
        if not self.vllm:
            return request.getfixturevalue("own")
        self.log = tmp_path / "audit.jsonl"
        return request.getfixturevalue("door_of")(RULES, tmp_path, audit=str(self.log), audit_prompts=True)

    @pytest.mark.parametrize("path", ["/v1/models", "/v1/steerings", "/metrics", "/docs", "/v1/nothing"])
    def test_who_has_no_key_sees_nothing(self, client: Any, path: str) -> None:
        for headers in ({}, bearer("eve"), {"Authorization": "Basic alice"}, bearer("alice2")):
            assert client.get(path, headers=headers).status_code == 401
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200

    def test_a_key_has_its_steerings_and_its_range(self, client: Any) -> None:
        listed = client.get("/v1/steerings", headers=bearer("alice")).json()["data"]
        assert [(entry["name"], entry["always"], entry["strength"]) for entry in listed] == [
            ("s0", False, [0, 2]),
            ("s7", True, [0, 2]),
        ]
        assert len(client.get("/v1/steerings", headers=bearer("bob")).json()["data"]) == 8
        assert self.ask(client, "alice", steering=[{"name": "s0", "strength": 2}]).status_code == 200
        assert self.ask(client, "alice", steering=[{"name": "s0", "strength": 2.1}]).status_code == 403
        assert self.ask(client, "alice", steering=[{"name": "s0", "strength": -0.1}]).status_code == 403
        hidden, missing = (self.ask(client, "alice", steering=[{"name": n}]) for n in ("s1", "s99"))
        assert (hidden.status_code, hidden.json()) == (404, missing.json())
        assert self.ask(client, "bob", steering=[{"name": "s1", "strength": -3}]).status_code == 200

    def test_what_is_always_on_stays_on(self, client: Any, tiny_lm: Any, steerings: Path) -> None:
        from trimtab import load

        body = self.ask(client, "bob").json()
        assert body["trimtab"]["steering"][0]["name"] == "s7"
        (answer,) = tiny_lm.generate(ASK, load(steerings / "s7.safetensors"), max_new_tokens=5)
        assert body["choices"][0]["message"]["content"] == answer.text
        for way in (
            {"steering": [{"name": "s7", "strength": -1}]},
            {"steering": [{"name": "s0"}], "rejection": True},
            {"rejection": {"beta": 1.0}},
            {"emphasize": ["The sea"]},
        ):
            assert self.ask(client, "bob", **way).status_code in (400, 403) if self.vllm else (403,), way
        emphasized = self.ask(client, "bob", emphasize=["The sea"], rejection=False)
        assert emphasized.status_code == (400 if self.vllm else 200)

    def test_strengths_of_one_steering_add_up(self, client: Any) -> None:
        """However often it is named, at whatever layers, and one way doesn't make room for the other."""

        def named(who: str, *amounts: tuple[float, int | None]) -> int:
            response = self.ask(client, who, steering=[{"name": "s0", "strength": s, "layer": at} for s, at in amounts])
            if response.status_code == 403:
                assert "add up to" in response.json()["error"]["message"]
            return int(response.status_code)

        assert named("alice", (1, None), (1, None)) == 200
        assert named("alice", *[(2, None)] * 16) == 403
        assert named("alice", (1.5, 1), (1.5, 2)) == 403
        assert named("bob", (3, None), (-3, 2)) == 200
        assert named("bob", (3, None), (-3, None), (0.5, None)) == 403
        assert named("bob", (-2, None), (-2, None)) == 403

    def test_what_is_always_on_is_not_cancelled_by_another_name(self, client: Any, steerings: Path) -> None:
        """s7's vector, under a name that bob gives it, or on vLLM who may change the server's."""
        import torch

        from trimtab import Add, Edit, Positions, Site, Steering, load
        from trimtab.files.steering_file import steering_to_bytes

        (edit,) = load(steerings / "s7.safetensors").edits
        kind = {"Content-Type": "application/octet-stream", **bearer("admin" if self.vllm else "bob")}
        at_path, status = ("/trimtab/steerings", 200) if self.vllm else ("/v1/steerings", 201)
        other = torch.randn(32, generator=torch.Generator().manual_seed(99))
        for name, direction, at in (
            ("same", edit.operation.direction, 1),
            ("near", edit.operation.direction + other, 2),
        ):
            mine = Steering((Edit(Site(at), Add(direction), Positions.all()),))
            put = client.put(f"{at_path}/{name}", content=steering_to_bytes(mine), headers=kind)
            assert put.status_code == status, put.text
        refused = self.ask(client, "bob", steering=[{"name": "same", "strength": -1}])
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "always_on")
        applied = self.ask(client, "bob", steering=[{"name": "near", "strength": -1}]).json()["trimtab"]
        assert 0 < applied["steering"][1]["taken_off"] < 1
        assert applied["steering"][0]["taken_off"] is None
        assert self.ask(client, "bob", steering=[{"name": "s3"}]).status_code == 403  # it keeps norms

    def test_every_request_is_written_down(self, client: Any) -> None:
        self.ask(client, "alice", steering=[{"name": "s0"}], user="u1")
        self.ask(client, "bob", stream=True)
        self.ask(client, "bob", steering=[{"name": "s99"}])
        assert client.get("/v1/models").status_code == 401
        begun, first, begun_too, second, refused, unknown = [
            json.loads(line) for line in self.log.read_text().splitlines()
        ]
        assert (begun["event"], first["event"], begun_too["event"]) == ("begun", "ended", "begun")
        assert (begun["request"], begun["steering"], begun["key"]) == (first["request"], first["steering"], "alice")
        assert (first["key"], first["user"], first["outcome"]) == ("alice", "u1", "done")
        assert [(entry["name"], entry["always"]) for entry in first["steering"]] == [("s7", True), ("s0", False)]
        assert begun["prompt"][0]["content"] == ASK[0]["content"]
        assert "prompt" not in first
        assert (second["key"], second["outcome"], second["tokens"]) == ("bob", "done", [5])
        assert (refused["event"], refused["key"], refused["status"]) == ("refused", "bob", 404)
        assert refused["steering"] == [{"name": "s99", "strength": 1.0}]
        assert (unknown["event"], unknown["key"], unknown["status"]) == ("refused", None, 401)
        assert unknown["route"] == "/v1/models"


class TestAdding(Asks):
    def test_steerings_can_be_added_by_who_may(self, own: Any, steerings: Path) -> None:
        client = own
        data = (steerings / "s0.safetensors").read_bytes()
        kind = {"Content-Type": "application/octet-stream"}
        put = lambda who, name, content: client.put(  # noqa: E731
            f"/v1/steerings/{name}", content=content, headers={**kind, **bearer(who)}
        )
        assert put("alice", "mine", data).status_code == 403
        assert put("bob", "s0", data).status_code == 400
        assert put("bob", "mine", data[:-8]).status_code == 400
        assert put("bob", "mine", b"\x80\x05pickle").status_code == 400
        for name in ("..", "a%2Fb", "%2e%2e%2fetc", "-x", "a" * 65):
            assert put("bob", name, data).status_code in (400, 404, 405), name
        made = put("bob", "mine", data)
        assert (made.status_code, made.json()["source"]) == (201, "uploaded")
        uploaded, original = (self.ask(client, "bob", steering=[{"name": name}]).json() for name in ("mine", "s0"))
        assert uploaded["choices"] == original["choices"]
        pairs = [{"prompt": f"{ask}?", "positive": "yes yes", "negative": "no no"} for ask in ("What", "Why", "Who")]
        body = {"name": "learned", "method": "caa", "pairs": pairs, "layers": [1]}
        assert client.post("/v1/steerings", json=body, headers=bearer("alice")).status_code == 403
        learned = client.post("/v1/steerings", json=body, headers=bearer("bob"))
        assert (learned.status_code, learned.json()["layers"]) == (201, [1])
        assert self.ask(client, "bob", steering=[{"name": "learned", "strength": 2}]).status_code == 200
        talk = [{**pair, "prompt": [{"role": "user", "content": "Why?"}], "system": "Be kind."} for pair in pairs]
        spoken = client.post("/v1/steerings", json={**body, "name": "y", "pairs": talk}, headers=bearer("bob"))
        assert spoken.status_code == 201
        assert spoken.json()["digest"] != learned.json()["digest"]
        parts = [{**pairs[0], "prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]}]
        refused = client.post("/v1/steerings", json={**body, "name": "z", "pairs": parts}, headers=bearer("bob"))
        assert refused.status_code in (400, 422)
        assert (
            client.post("/v1/steerings", json={**body, "name": "x", "pairs": [{}]}, headers=bearer("bob")).status_code
            == 400
        )
        assert [entry["name"] for entry in client.get("/v1/steerings", headers=bearer("bob")).json()["data"]].count(
            "mine"
        ) == 1
        assert "mine" not in client.get("/v1/steerings", headers=bearer("alice")).text
        assert sorted(path.name for path in steerings.iterdir()) == [f"{name}.safetensors" for name in NAMES]


class TestLimits:
    def test_adding_is_off_unless_it_is_on(
        self, make_service: Callable[..., Any], client_of: Callable[..., Any]
    ) -> None:
        client = client_of(make_service())
        assert client.put("/v1/steerings/x", content=b"").status_code == 405
        assert client.post("/v1/steerings", json={}).status_code == 405

    def test_sizes(self, make_service: Callable[..., Any], client_of: Callable[..., Any]) -> None:
        client = client_of(make_service(limits={"body": 4096, "answers": 4, "prompt_tokens": 40}))
        assert client.post(PATH, content=b"x" * 5000).status_code == 413
        assert client.post(PATH, content=iter([b"x" * 3000] * 2)).status_code == 413
        assert client.post(PATH, json={**BODY, "n": 5}).status_code == 400
        assert client.post(PATH, json={**BODY, "max_tokens": 65}).status_code == 400
        long = [{"role": "user", "content": "blue " * 60}]
        assert "40 are allowed" in client.post(PATH, json={**BODY, "messages": long}).json()["error"]["message"]
        assert client.post(PATH, json={**BODY, "stop": ["a"] * 5}).status_code == 400
        assert client.post(PATH, json={**BODY, "n": 4}).status_code == 200

    def test_a_dose_above_the_cap(self, make_service: Callable[..., Any], client_of: Callable[..., Any]) -> None:
        client = client_of(make_service(policy=Policy(max_dose=1.0)))
        mild, wild = ({**BODY, "steering": [{"name": "s0", "strength": s}]} for s in (0.01, 100))
        assert client.post(PATH, json=mild).status_code == 200
        answer = client.post(PATH, json={**BODY, "steering": [{"name": "s0", "strength": 0.1}]}).json()
        (each,) = answer["trimtab"]["answers"]
        assert each["total_dose"] == each["dose"] == sum(d["ratio"] for d in each["doses"])
        many = [{"name": "s0", "strength": 0.1 * 0.8 / each["dose"], "layer": layer} for layer in (0, 1, 2)]
        assert client.post(PATH, json={**BODY, "steering": many[:1]}).status_code == 200
        assert client.post(PATH, json={**BODY, "steering": many}).json()["error"]["code"] == "dose_too_high"
        for stream in (False, True):
            refused = client.post(PATH, json={**wild, "stream": stream})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "dose_too_high")
        assert client.post(PATH, json={**mild, "rejection": True}).status_code == 400

    def test_the_bytes_of_tokens_are_the_texts(
        self, make_service: Callable[..., Any], client_of: Callable[..., Any]
    ) -> None:
        """Of a character that several tokens make each has its part, which no text could say."""
        body = {**BODY, "temperature": 2, "seed": 5, "n": 4, "max_tokens": 30, "logprobs": True, "top_logprobs": 0}
        parts = 0
        for choice in client_of(make_service()).post(PATH, json=body).json()["choices"]:
            tokens = choice["logprobs"]["content"]
            written = [token for token in tokens if not token["token"].startswith("<|")]  # special ones are no text
            together = bytes(byte for token in written for byte in token["bytes"] or [])
            assert together.decode(errors="replace") == choice["message"]["content"]
            parts += sum("\ufffd" in token["token"] and token["bytes"] is not None for token in tokens)
        assert parts > 3

    def test_rejection_of_a_steering_at_one_layer(
        self, make_service: Callable[..., Any], client_of: Callable[..., Any]
    ) -> None:
        """Layers can't be halved there: it is weakened in strength, unless the request says how."""
        client = client_of(make_service(limits={"rejecting_tokens": 60}))
        steered = {**BODY, "steering": [{"name": "s0"}]}
        for wish in (True, {"beta": 0.3}, {"ladder": "strength"}):
            response = client.post(PATH, json={**steered, "rejection": wish})
            assert response.status_code == 200, response.text
            assert response.json()["trimtab"]["answers"][0]["rejection"]["tokens"] == 5
        assert client.post(PATH, json={**steered, "rejection": {"ladder": "halve"}}).status_code == 400
        long = {**steered, "messages": [{"role": "user", "content": "blue " * 70}]}
        refused = client.post(PATH, json={**long, "rejection": True})
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert client.post(PATH, json=long).status_code == 200

    def test_it_answers_to_its_own_names_only(
        self, make_service: Callable[..., Any], client_of: Callable[..., Any]
    ) -> None:
        client = client_of(make_service(), local=True)
        for host, status in (("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 403)):
            assert client.get("/healthz", headers={"Host": host}).status_code == status, host


VALUES: list[Any] = [
    None, True, -1, 0, 10**30, 1e308, -1e308, "", "x", "\x00", "../../etc/passwd", "/etc/passwd", "s0\n", "💥" * 50,
    "\ud800", [], [[]], {}, {"a": {}}, [None], ["x"] * 200, {"name": "../s0"}, [{"name": "s0", "strength": "1"}],
    [{"name": "s0", "strength": 1e400}], [{"name": "/etc/passwd"}], [{"name": "s0", "strength": float("nan")}],
    [{"name": "s0", "strength": float("inf")}], [{"name": "s0", "path": "x"}], [{"role": "user"}],
    [{"role": "god", "content": "x"}], [{"role": "user", "content": 5}], {"beta": 2}, {"beta": float("nan")},
    [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], 3.5, "9" * 5000, "required",
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "strin"}}}],
    [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}],
    [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"pattern": "(a{1,9}){9,}"}}}}}],
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/$defs/x", "$defs": {"x": {}}}}},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1e308, "\ud800", None]}}},
    {"type": "json_object"}, {"type": "function", "function": {"name": "f"}}, {"format": {"type": "json_object"}},
    [{"role": "tool", "content": "x", "tool_call_id": "1"}], [{"type": "function_call_output", "call_id": "1"}],
    [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[" * 5000}}]}],
]  # fmt: skip


class TestMalformed:
    """A thousand requests that make no sense: each gets a 4xx with an error in words, and the server goes on."""

    def fuzzed(self, chance: random.Random, items: bool = False) -> bytes:
        kind = chance.random()
        if kind < 0.1:
            return bytes(chance.randrange(256) for _ in range(chance.randrange(60)))
        if kind < 0.2:
            return json.dumps(BODY).encode()[: chance.randrange(1, 60)]
        if kind < 0.25:
            return b"[" * chance.choice([10, 10_000]) + b"]" * 5
        body: dict[str, Any] = dict(BODY)
        if kind < 0.35:
            body[chance.choice(["steerng", "path", "__class__", "file", "\ud800"])] = chance.choice(VALUES)
        fields = [*BODY, "steering", "emphasize", "rejection", "n", "top_p", "seed", "stop", "stream", "logit_bias"]
        fields += ["stream_options", "top_logprobs", "tools", "response_format", "presence_penalty", "tool_choice"]
        if items:
            body["input"] = body.pop("messages")
            fields = [name.replace("messages", "input") for name in fields] + ["text", "instructions", "store"]
        for name in chance.sample(fields, chance.randint(1, 4)):
            body[name] = chance.choice(VALUES)
        return json.dumps(body).encode()

    def test_a_thousand(self, make_service: Callable[..., Any], client_of: Callable[..., Any]) -> None:
        service = make_service()
        client, chance = client_of(service), random.Random(0)
        refused = 0
        for i in range(1000):
            where = "/v1/completions" if i % 5 == 0 else "/v1/responses" if i % 5 == 1 else PATH
            content = self.fuzzed(chance, "responses" in where)
            response = client.post(where, content=content, headers={"Content-Type": "application/json"})
            assert response.status_code < 500, (content, response.text)
            if response.status_code >= 400:
                refused += 1
                error = response.json()["error"]
                assert error["message"]
                assert error["type"]
                assert "Traceback" not in response.text
        assert refused > 750  # some of them make sense by chance
        assert client.post(PATH, json=BODY).status_code == 200
        assert service.scheduler.running == service.scheduler.queued == 0

    @pytest.mark.parametrize(
        "path",
        ["/v1/steerings/..%2f..%2fetc%2fpasswd", "/v1/steerings/%00", "/v1/models/../../etc", "/../../etc/passwd"],
    )
    def test_paths_that_lead_nowhere(
        self, make_service: Callable[..., Any], client_of: Callable[..., Any], path: str
    ) -> None:
        assert client_of(make_service()).get(path).status_code == 404


class TestDocument:
    def test_every_route_has_an_example_and_says_its_errors(
        self, make_service: Callable[..., Any], client_of: Callable[..., Any]
    ) -> None:
        document = client_of(make_service(learn=True, upload=True)).get("/openapi.json").json()
        assert set(document["paths"]) >= {PATH, "/v1/completions", "/v1/models", "/v1/steerings", "/healthz", "/readyz"}
        for name in ("ChatRequest", "CompletionRequest", "LearnRequest"):
            (example,) = document["components"]["schemas"][name]["examples"]
            assert example
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                assert operation["summary"], path
                if path.startswith("/v1"):
                    assert "401" in operation["responses"], (path, method)


def test_nothing_of_a_refused_body_is_kept(make_service: Callable[..., Any], client_of: Callable[..., Any]) -> None:
    """Parsed it is many times its bytes, and a server that waits for the garbage collector grows by it."""
    client = client_of(make_service())
    wrong = {"role": "user", "content": [{} for _ in range(4321)]}
    sent = json.dumps(BODY | {"messages": [wrong]}).encode()
    del wrong
    gc.collect()
    gc.disable()
    try:
        assert client.post("/v1/chat/completions", content=sent).status_code == 400
        assert not [item for item in gc.get_objects() if type(item) is list and len(item) == 4321]
    finally:
        gc.enable()
