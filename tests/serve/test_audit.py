"""The audit log: whole lines whatever the disk does, a door that closes while there are none, and cut answers in it."""

from __future__ import annotations

import asyncio
import json
import math
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="serving needs trimtab[serve]")

from trimtab.errors import TrimtabError
from trimtab.serve import audit as module
from trimtab.serve.audit import Audit
from trimtab.serve.refusals import Refusal

PATH = "/v1/completions"
BODY: dict[str, Any] = {"model": "trimtab", "prompt": "The sea is", "max_tokens": 5, "temperature": 0}


def lines(path: Path) -> list[dict[str, Any]]:
    """Every line, each of which is JSON as the standard has it."""

    def no_constant(name: str) -> Any:
        raise AssertionError(name)

    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


@contextmanager
def full_disk(path: Path, more: int) -> Iterator[None]:
    """No file of this process may grow so many bytes beyond this one's size: the write that crosses it is cut."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)


class TestLines:
    @pytest.mark.parametrize("sync", [False, True])
    @pytest.mark.parametrize("room", [0, 1, 40, 90])
    def test_a_line_that_does_not_fit_leaves_nothing(self, tmp_path: Path, sync: bool, room: int) -> None:
        log = Audit(tmp_path / "a.jsonl", sync=sync)
        log.write({"n": 1})
        with full_disk(tmp_path / "a.jsonl", room):
            for _ in range(3):
                with pytest.raises(Refusal) as refused:
                    log.write({"n": 2, "long": "x" * 200})
            assert (refused.value.status, refused.value.code) == (503, "unaudited")
            assert log.trouble
            assert room > 60 or not log.check()
        assert log.check()
        log.write({"n": 3})
        log.close()
        entries = lines(tmp_path / "a.jsonl")
        assert [entry["n"] for entry in entries if "n" in entry] == [1, 3]
        assert [entry["event"] for entry in entries if "event" in entry] == ["resumed"]

    def test_a_cut_last_line_is_kept_as_a_line(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"n":1}\n{"n":2,"text":"caf\xc3')
        log = Audit(path)
        log.write({"n": 3})
        log.close()
        first, mended, third = lines(path)
        assert (first["n"], third["n"]) == (1, 3)
        assert (mended["event"], mended["fragment"]) == ("mended", '{"n":2,"text":"caf\\xc3')

    def test_what_is_no_number_in_json(self, tmp_path: Path) -> None:
        log = Audit(tmp_path / "a.jsonl")
        log.write({"doses": [math.inf, -math.inf, math.nan, 0.5], "in": {"x": math.inf}})
        (entry,) = lines(tmp_path / "a.jsonl")
        assert (entry["doses"], entry["in"]) == (["inf", "-inf", "nan", 0.5], {"x": "inf"})

    def test_threads_write_whole_lines(self, tmp_path: Path) -> None:
        log = Audit(tmp_path / "a.jsonl")
        threads = [
            threading.Thread(target=lambda i=i: [log.write({"i": i, "x": "y" * 3000}) for _ in range(20)])
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(entry["i"] for entry in lines(tmp_path / "a.jsonl")) == sorted(list(range(8)) * 20)

    def test_two_servers_have_two_files(self, tmp_path: Path) -> None:
        first = Audit(tmp_path / "a.jsonl")
        with pytest.raises(TrimtabError, match="another server is writing to it"):
            Audit(tmp_path / "a.jsonl")
        first.close()
        Audit(tmp_path / "a.jsonl").close()

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", tmp_path, tmp_path / "none" / "a.jsonl"):
            with pytest.raises(TrimtabError, match="can't write the audit log"):
                Audit(path)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
    def test_a_device_that_is_always_full(self) -> None:
        log = Audit(Path("/dev/full"))
        with pytest.raises(Refusal):
            log.write({"n": 1})
        assert not log.check()

    def test_a_process_that_is_killed(self, tmp_path: Path) -> None:
        """What was written before it was killed is there, whole."""
        code = (
            "import os,pathlib,sys; from trimtab.serve.audit import Audit; log = Audit(pathlib.Path(sys.argv[1]))\n"
            "for i in range(50): log.write({'i': i})\nos.kill(os.getpid(), 9)"
        )
        ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.jsonl")], check=False)
        assert ran.returncode == -9
        assert [entry["i"] for entry in lines(tmp_path / "a.jsonl")] == list(range(50))


@pytest.fixture
def served(make_service: Callable[..., Any], client_of: Callable[..., Any], tmp_path: Path) -> Any:
    log = tmp_path / "a.jsonl"
    service = make_service(audit=Audit(log))
    return client_of(service), service, log


class TestTheDoor:
    @pytest.mark.parametrize("stream", [False, True])
    def test_nothing_is_answered_unaudited(self, served: Any, stream: bool) -> None:
        client, service, log = served
        body = {**BODY, "stream": stream}
        assert client.post(PATH, json=body).status_code == 200
        before = lines(log)
        with full_disk(log, 30):
            for _ in range(2):
                response = client.post(PATH, json=body)
                assert (response.status_code, response.json()["error"]["code"]) == (503, "unaudited")
                assert response.headers["Retry-After"]
            assert service.scheduler.running == service.scheduler.queued == 0
            assert client.get("/readyz").json() == {"status": "unaudited"}
            assert client.get("/readyz").status_code == 503
            assert client.get("/healthz").status_code == 200
            assert "trimtab_audit_writable 0.0" in client.get("/metrics").text
        assert lines(log) == before
        assert client.get("/readyz").status_code == 200
        assert client.post(PATH, json=body).status_code == 200
        assert [entry["event"] for entry in lines(log)] == ["begun", "ended", "resumed", "begun", "ended"]

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_disk_that_fills_up_during_an_answer(self, served: Any, stream: bool) -> None:
        """The line of its beginning is there; the end isn't told as one, and nobody else is let in."""
        client, service, log = served
        write, full = service.audit.write, []

        def fails_at_the_end(entry: dict[str, Any], prompt: Any = None) -> None:
            if entry["event"] == "ended" and not full:
                full.append(True)
                with full_disk(log, 10):
                    write(entry, prompt)
            else:
                write(entry, prompt)

        service.audit.write = fails_at_the_end
        response = client.post(PATH, json={**BODY, "stream": stream})
        if stream:
            assert "unaudited" in response.text.split("data: ")[-2]
        else:
            assert (response.status_code, response.json()["error"]["code"]) == (503, "unaudited")
        assert [entry["event"] for entry in lines(log)] == ["begun"]

    def test_the_beginning_is_there_before_the_first_token(self, served: Any) -> None:
        client, _, log = served
        with client.stream("POST", PATH, json={**BODY, "stream": True, "max_tokens": 20}) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    assert lines(log)[0]["event"] == "begun"
                    break


class TestCutAnswers:
    def test_they_have_their_tokens_and_doses(self, make_service: Callable[..., Any], tmp_path: Path) -> None:
        from trimtab.serve.policy import ANYBODY
        from trimtab.serve.records import Record
        from trimtab.serve.schema import CompletionRequest

        log = tmp_path / "a.jsonl"
        service = make_service(audit=Audit(log))
        service.scheduler.start()
        wanted = CompletionRequest.model_validate(
            {**BODY, "max_tokens": 60, "steering": [{"name": "s0"}], "n": 2, "prompt": ["The sea", "Why"]}
        )
        prepared = service.prepare(ANYBODY, wanted)
        record = Record(service, {"request": "r", "key": "k", "route": PATH}, wanted, prepared, "id")
        come = threading.Semaphore(0)
        for i, task in enumerate(prepared.tasks):
            task.deliver = record.wrap_deliver(i, lambda _event: come.release())
        asyncio.run(record.begin())
        service.scheduler.submit(prepared.tasks)
        for _ in range(12):
            assert come.acquire(timeout=60)
        record.end("cancelled")
        until = time.monotonic() + 60
        while len(lines(log)) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        begun, ended = lines(log)
        assert (begun["event"], ended["event"], ended["outcome"]) == ("begun", "ended", "cancelled")
        assert sum(ended["tokens"]) >= 12
        assert all(dose > 0 for dose, tokens in zip(ended["doses"], ended["tokens"], strict=True) if tokens > 1)
        assert ended["total_doses"] == pytest.approx(ended["doses"])
        record.end("done")
        assert len(lines(log)) == 2

    def test_a_push_that_cannot_be_measured_ends_its_answer(
        self, make_service: Callable[..., Any], client_of: Callable[..., Any]
    ) -> None:
        import torch

        from trimtab import Add, Edit, Positions, Site, Steering
        from trimtab.serve.library import LoadedSteering

        service = make_service()
        client = client_of(service)
        wild = Steering((Edit(Site(3), Add(torch.full((32,), 3e37)), Positions.all()),))
        service.library._loaded[None, "wild"] = LoadedSteering("wild", wild, "0" * 64, "file")  # nobody may bring it
        for stream in (False, True):
            response = client.post(PATH, json={**BODY, "steering": [{"name": "wild"}], "stream": stream})
            assert response.status_code == 400 or "error" in response.text, response.text
            assert "lower the strength" in response.text
        assert client.post(PATH, json=BODY).status_code == 200
