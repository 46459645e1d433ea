"""A server that runs on: its folder is read again on SIGHUP, and its access log says who came."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from trimtab.errors import TrimtabError
from trimtab.serve.access import AccessLog
from trimtab.serve.library import read_folder, reload
from trimtab.serve.policy import Key, Policy


@pytest.fixture
def mine(steerings: Path, tmp_path: Path) -> Path:
    """Some of the steerings, in a folder that a test may change."""
    where = tmp_path / "steerings"
    where.mkdir()
    for name in ("s0", "s1", "s2"):
        shutil.copy(steerings / f"{name}.safetensors", where)
    return where


class TestReload:
    def test_new_changed_and_gone(self, tiny_lm: Any, mine: Path, steerings: Path) -> None:
        library = read_folder(tiny_lm, mine)
        kept, old = library.get("s0"), library.get("s1")
        library.add("brought", library.get("s0").steering, "uploaded", "alice")
        shutil.copy(steerings / "s5.safetensors", mine / "s1.safetensors")
        shutil.copy(steerings / "s3.safetensors", mine)
        (mine / "s2.safetensors").unlink()
        assert reload(library, mine, Policy()) == (["s3"], ["s1"], ["s2"])
        assert library.names == ["s0", "s1", "s3"]
        assert library.get("s0").digest == kept.digest
        assert library.get("s1").digest != old.digest
        assert library.get("s2") is None
        assert library.get("brought", "alice") is not None  # what clients brought stays

    def test_all_or_nothing(self, tiny_lm: Any, mine: Path, steerings: Path) -> None:
        library = read_folder(tiny_lm, mine)
        shutil.copy(steerings / "s3.safetensors", mine)
        (mine / "s4.safetensors").write_bytes(b"no steering")
        with pytest.raises(TrimtabError, match="s4"):
            reload(library, mine, Policy())
        assert library.names == ["s0", "s1", "s2"]

    def test_what_the_policy_names_stays(self, tiny_lm: Any, mine: Path, steerings: Path) -> None:
        library = read_folder(tiny_lm, mine)
        always = Policy(always=(("s0", 1.0),))
        shutil.copy(steerings / "s5.safetensors", mine / "s0.safetensors")
        with pytest.raises(TrimtabError, match="s0 is always on and has changed"):
            reload(library, mine, always)
        (mine / "s0.safetensors").unlink()
        with pytest.raises(TrimtabError, match="the policy names 's0'"):
            reload(library, mine, always)
        assert library.get("s0") is not None


class TestAccessLog:
    def test_a_line_a_request(self, make_service: Any, client_of: Any, tmp_path: Path) -> None:
        from hashlib import sha256

        log = tmp_path / "access.jsonl"
        keys = (Key("alice", sha256(b"a").digest()),)
        client = client_of(make_service(policy=Policy(keys=keys), access=AccessLog(log)))
        got = client.get("/v1/steerings", headers={"Authorization": "Bearer a"})
        client.get("/v1/models")
        client.get("/nowhere" + 300 * "x", headers={"Authorization": "Bearer a"})
        first, second, third = map(json.loads, log.read_text().splitlines())
        assert first["request"] == got.headers["x-request-id"]
        assert (first["key"], first["method"], first["path"], first["status"]) == ("alice", "GET", "/v1/steerings", 200)
        assert first["seconds"] >= 0
        assert (second["key"], second["status"]) == (None, 401)
        assert third["status"] == 404
        assert len(third["path"]) == 200

    def test_neither_prompts_nor_keys_are_in_it(self, make_service: Any, client_of: Any, tmp_path: Path) -> None:
        log = tmp_path / "access.jsonl"
        client = client_of(make_service(access=AccessLog(log)))
        body = {"model": "trimtab", "messages": [{"role": "user", "content": "w5 w6"}], "max_tokens": 2}
        assert (
            client.post("/v1/chat/completions", json=body, headers={"Authorization": "Bearer sk-x"}).status_code == 200
        )
        assert "w5" not in log.read_text()
        assert "sk-x" not in log.read_text()

    def test_a_full_disk_stops_nobody(self) -> None:
        log = AccessLog(Path("/dev/full"))
        state = {"request_id": "req-1"}
        log.write({"method": "GET", "path": "/"}, state, 200, 0.1)
        assert log._lost == 1

    def test_one_that_cant_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(TrimtabError, match="can't write the access log"):
            AccessLog(tmp_path / "none" / "log")


def test_a_span_for_each_request_without_its_text(make_service: Any) -> None:
    pytest.importorskip("opentelemetry.instrumentation.fastapi", reason="tracing needs trimtab[otel]")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from starlette.testclient import TestClient

    from trimtab.serve.app import make_app

    sent, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(sent))
    parent = f"00-{7:032x}-{9:016x}-01"
    body = {"model": "trimtab", "messages": [{"role": "user", "content": "w5 w6"}], "max_tokens": 3, "stream": True}
    with TestClient(make_app(make_service(), provider=provider)) as client:
        got = client.post("/v1/chat/completions", json=body, headers={"traceparent": parent})
        client.get("/healthz")
        client.get("/v1/steerings/nothing")
        first, second = sent.get_finished_spans()
    assert first.name == "POST /v1/chat/completions"
    assert first.context.trace_id == 7
    assert first.attributes["trimtab.request"] == got.headers["x-request-id"]
    assert "w5" not in first.to_json()
    assert second.name == "GET /v1/steerings/{name}"
    assert 404 in second.attributes.values()


@pytest.mark.slow
def test_sighup_reads_the_folder_again_and_reopens_the_log(
    start: Any, mine: Path, steerings: Path, tmp_path: Path
) -> None:
    log = tmp_path / "access.jsonl"
    server = start("--access-log", str(log), known=mine)

    def names() -> list[str]:
        return [steering["name"] for steering in httpx.get(f"{server.url}/v1/steerings").json()["data"]]

    def after(sign: str, where: Path = server.log) -> str:
        for _ in range(300):
            if where.exists() and sign in (text := where.read_text()):
                return text
            time.sleep(0.1)
        raise AssertionError(server.log.read_text())

    assert names() == ["s0", "s1", "s2"]
    log.rename(tmp_path / "moved.jsonl")
    shutil.copy(steerings / "s3.safetensors", mine)
    server.process.send_signal(signal.SIGHUP)
    assert "1 new, 0 changed, 0 gone" in after("again:")
    assert names() == ["s0", "s1", "s2", "s3"]
    # A line is written when its answer is through, which may be after the client has read it.
    assert json.loads(after("\n", log).splitlines()[-1])["path"] == "/v1/steerings"
    (mine / "s4.safetensors").write_bytes(b"no steering")
    server.process.send_signal(signal.SIGHUP)
    assert "s4" in after("nothing was reloaded:")
    assert names() == ["s0", "s1", "s2", "s3"]
    assert server.stop() == 0
