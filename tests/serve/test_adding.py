"""Steerings that clients bring: bounded, their owner's alone, gone when deleted, and telling nothing of others'."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab import Add, Edit, Positions, Site, Steering, Threshold
from trimtab.files.steering_file import steering_to_bytes
from trimtab.steering.gates import AllOf, AnyOf, Not

pytest.importorskip("fastapi", reason="serving needs trimtab[serve]")

from trimtab.serve import bounds, library
from trimtab.serve.audit import Audit
from trimtab.serve.bounds import check_bounds, check_file, size_of
from trimtab.serve.policy import Key, Policy
from trimtab.serve.refusals import Refusal

PATH = "/v1/completions"
BODY: dict[str, Any] = {"model": "trimtab", "prompt": "The sea is", "max_tokens": 3, "temperature": 0}
KIND = {"Content-Type": "application/octet-stream"}
V = torch.randn(32, generator=torch.Generator().manual_seed(0))


def secret(name: str, **options: Any) -> Key:
    return Key(name, hashlib.sha256(name.encode()).digest(), **options)


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


def addition(direction: torch.Tensor = V, **options: Any) -> Edit:
    return Edit(Site(1), Add(direction), Positions.all(), **options)


def condition(number: int) -> Threshold:
    return Threshold(Site(0), V + number, 0.5)


def nested(depth: int) -> Any:
    gate: Any = condition(0)
    for _ in range(depth):
        gate = Not(gate)
    return gate


TOO_MUCH: list[tuple[str, Callable[[], Steering], str]] = [
    ("edits", lambda: Steering((addition(),) * (bounds.EDITS + 1)), "257 edits"),
    ("depth", lambda: Steering((addition(gate=nested(bounds.DEPTH + 2)),)), "nested"),
    ("parts", lambda: Steering((addition(gate=AnyOf((condition(0),) * 65)),)), "65 parts"),
    (
        "tests",
        lambda: Steering(tuple(addition(gate=AllOf(tuple(condition(9 * i + j) for j in range(9)))) for i in range(9))),
        "64",
    ),
    ("norm", lambda: Steering((addition(torch.full((32,), 1e30)),)), "vector of norm"),
    ("strength", lambda: Steering((addition(strength=1e9),)), "vector of norm"),
    ("product", lambda: Steering((addition(1e4 * V, strength=1e3),)), "vector of norm"),
]


@pytest.fixture
def client(make_service: Callable[..., Any], client_of: Callable[..., Any], tmp_path: Path) -> Any:
    keys = (
        secret("ann", add=True),
        secret("ben", add=True),
        secret("eve", add=True, steerings=frozenset({"s0"})),
        secret("dan"),
    )
    service = make_service(policy=Policy(keys), audit=Audit(tmp_path / "a.jsonl"), upload=True, learn=True)
    opened = client_of(service)
    opened.service = service
    return opened


def put(client: Any, who: str, name: str, steering: Steering | bytes | None = None) -> Any:
    data = steering if isinstance(steering, bytes) else steering_to_bytes(steering or Steering((addition(),)))
    return client.put(f"/v1/steerings/{name}", content=data, headers={**KIND, **bearer(who)})


def names(client: Any, who: str) -> list[str]:
    return [each["name"] for each in client.get("/v1/steerings", headers=bearer(who)).json()["data"]]


def ask(client: Any, who: str, name: str) -> Any:
    return client.post(PATH, json={**BODY, "steering": [{"name": name}]}, headers=bearer(who))


class TestBounds:
    @pytest.mark.parametrize(("name", "make", "words"), TOO_MUCH, ids=[name for name, _, _ in TOO_MUCH])
    def test_what_is_too_much_is_not_taken(
        self, client: Any, name: str, make: Callable[[], Steering], words: str
    ) -> None:
        with pytest.raises(Refusal, match=words):
            check_bounds(make())
        response = put(client, "ann", "mine", make())
        assert (response.status_code, response.json()["error"]["code"]) == (400, "too_large"), response.text
        assert "mine" not in names(client, "ann")

    def test_what_is_just_enough_is(self) -> None:
        check_bounds(Steering((addition(),) * bounds.EDITS))
        check_bounds(Steering((addition(gate=nested(bounds.DEPTH)),)))
        check_bounds(Steering(tuple(addition(gate=condition(1)) for _ in range(100))))  # the same condition, read once

    @pytest.mark.parametrize("depth", [100, 600, 20_000])
    def test_files_nested_as_no_gate_can_be(self, client: Any, depth: int) -> None:
        inner = '{"not":' * depth + "{}" + "}" * depth
        header = json.dumps({"__metadata__": {"trimtab": f'{{"format":1,"edits":[{inner}],"digest":""}}'}}).encode()
        response = put(client, "ann", "deep", len(header).to_bytes(8, "little") + header)
        assert response.status_code == 400, response.text
        assert "nested" in response.json()["error"]["message"]

    def test_a_header_that_is_too_long(self) -> None:
        header = b'{"__metadata__":{"trimtab":"' + b"x" * bounds.HEADER + b'"}}'
        with pytest.raises(Refusal, match="its header has"):
            check_file(len(header).to_bytes(8, "little") + header)
        check_file(steering_to_bytes(Steering((addition(),) * 200)))

    def test_memory(self, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        assert (
            size_of(Steering((addition(), addition()))) == 2 * 32 * 4
            or size_of(Steering((addition(), addition()))) == 32 * 4
        )
        monkeypatch.setattr(library, "MOST_BYTES", 300)
        assert put(client, "ann", "a").status_code == put(client, "ben", "b").status_code == 201
        assert "take up at most" in put(client, "ann", "c").json()["error"]["message"]
        monkeypatch.setattr(library, "MOST_BYTES", 1 << 20)
        monkeypatch.setattr(library, "MOST_OWNED", 2)
        assert put(client, "ann", "c").status_code == 201
        assert "delete one" in put(client, "ann", "d").json()["error"]["message"]
        assert put(client, "ben", "d").status_code == 201


class TestOwners:
    def test_what_a_key_brings_is_its_own(self, client: Any) -> None:
        assert put(client, "ann", "mine").status_code == 201
        assert ask(client, "ann", "mine").status_code == 200
        for who in ("ben", "dan", "eve"):
            assert "mine" not in names(client, who)
            hidden, missing = ask(client, who, "mine"), ask(client, who, "nothing")
            assert (hidden.status_code, hidden.text) == (404, missing.text.replace("nothing", "mine"))
            assert client.get("/v1/steerings/mine", headers=bearer(who)).status_code == 404

    def test_names_tell_nothing_of_what_is_hidden(self, client: Any) -> None:
        """A key that knows s0 alone brings an s1 of its own, as it would bring any other name, and uses it."""
        own, other = Steering((addition(50 * V),)), Steering((addition(-50 * V),))
        assert put(client, "ann", "x", own).status_code == put(client, "ben", "x", other).status_code == 201
        assert put(client, "eve", "s1", own).status_code == put(client, "eve", "new", own).status_code == 201
        assert names(client, "eve") == ["new", "s0", "s1"]
        texts = {
            (who, name): ask(client, who, name).json()["choices"]
            for who, name in (("ann", "x"), ("ben", "x"), ("eve", "s1"), ("ben", "s1"))
        }
        assert texts["ann", "x"] == texts["eve", "s1"] != texts["ben", "x"]
        assert texts["eve", "s1"] != texts["ben", "s1"]
        taken = put(client, "eve", "s0")
        assert (taken.status_code, "already" in taken.json()["error"]["message"]) == (400, True)
        assert put(client, "ann", "x").status_code == put(client, "ann", "s1").status_code == 400

    def test_deleting(self, client: Any, tmp_path: Path) -> None:
        def delete(who: str, name: str) -> int:
            return int(client.delete(f"/v1/steerings/{name}", headers=bearer(who)).status_code)

        assert put(client, "ann", "mine").status_code == 201
        assert (delete("ben", "mine"), delete("eve", "mine"), delete("dan", "mine")) == (404, 404, 403)
        assert (delete("ann", "s0"), delete("eve", "s1"), delete("ann", "none")) == (403, 404, 404)
        gone = client.delete("/v1/steerings/mine", headers=bearer("ann"))
        assert gone.json() == {"id": "mine", "object": "steering.deleted", "deleted": True}
        assert ask(client, "ann", "mine").status_code == 404
        assert put(client, "ann", "mine").status_code == 201
        entries = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        events = [(each["event"], each["key"]) for each in entries if each["event"] in ("added", "removed")]
        assert events == [("added", "ann"), ("removed", "ann"), ("added", "ann")]

    def test_what_cannot_be_written_down_is_not_added(self, client: Any) -> None:
        audit = client.service.audit
        write = audit.write

        def full(entry: dict[str, Any], prompt: Any = None) -> None:
            raise Refusal(503, "full", code="unaudited") if entry["event"] in ("added", "removed") else write(entry)

        audit.write = full
        assert put(client, "ann", "mine").status_code == 503
        assert "mine" not in names(client, "ann")
        audit.write = write
        assert put(client, "ann", "mine").status_code == 201
        audit.write = full
        assert client.delete("/v1/steerings/mine", headers=bearer("ann")).status_code == 503
        assert "mine" in names(client, "ann")

    def test_without_keys_all_is_everybodys(
        self, make_service: Callable[..., Any], client_of: Callable[..., Any]
    ) -> None:
        client = client_of(make_service(upload=True))
        assert put(client, "x", "mine").status_code == 201
        assert ask(client, "y", "mine").status_code == 200
        assert client.delete("/v1/steerings/mine").status_code == 200


def test_a_pipe_in_the_folder_is_refused(tiny_lm: Any, tmp_path: Path) -> None:
    import os

    from trimtab.errors import TrimtabError
    from trimtab.serve.library import read_folder

    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(TrimtabError, match="isn't a regular file"):
        read_folder(tiny_lm, tmp_path)
