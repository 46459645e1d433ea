"""A real server on a real socket, and clients that mean it no good: strangers, slow ones, too many, deaf ones."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="serving needs trimtab[serve]")

from trimtab.serve import bodies, connections
from trimtab.serve.audit import Audit
from trimtab.serve.policy import Key, Policy

PATH = "/v1/completions"
BODY: dict[str, Any] = {"model": "trimtab", "prompt": "The sea is", "max_tokens": 5, "temperature": 0}
KEY = {"Authorization": "Bearer ann"}
KEYS = Policy((Key("ann", hashlib.sha256(b"ann").digest(), add=True),))
PATIENCE = 60


@dataclass
class Live:
    service: Any
    guard: Any
    server: Any
    port: int
    log: Path
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, **options: int) -> socket.socket:
        made = socket.socket()
        for option, value in options.items():
            made.setsockopt(socket.SOL_SOCKET, getattr(socket, option), value)
        made.settimeout(PATIENCE)
        made.connect(("127.0.0.1", self.port))
        return made

    def ask(self, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{PATH}", json={**BODY, **more}, headers=KEY, timeout=PATIENCE)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def live(make_service: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """A server in a thread of its own."""
    from trimtab.serve.app import make_app
    from trimtab.serve.run import bind, make_server

    started: list[Live] = []

    def start(policy: Policy = KEYS, most: int = 40, **options: Any) -> Live:
        log = tmp_path / "a.jsonl"
        service = make_service(policy=policy, audit=Audit(log), upload=True, learn=True, **options)
        guard, bound = make_app(service, local=True), bind("127.0.0.1", 0)
        server = make_server(guard, service.scheduler, grace=5, connections=most)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        begun = Live(service, guard, server, bound.getsockname()[1], log, thread)
        started.append(begun)
        thread.start()
        until(lambda: server.started)
        return begun

    yield start
    for running in started:
        running.server.should_exit = True
        running.thread.join(PATIENCE)
        assert not running.thread.is_alive()


def until(there: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)


def head(method: str, path: str, port: int, length: int, **headers: str) -> bytes:
    more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{method} {path} HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def status(raw: socket.socket) -> int:
    got = b""
    while b"\r\n" not in got:
        more = raw.recv(4096)
        if not more:
            return 0
        got += more
    return int(got.split()[1])


class TestStrangers:
    @pytest.mark.parametrize(
        ("method", "path"), [("POST", PATH), ("PUT", "/v1/steerings/x"), ("PUT", "/"), ("POST", "/x")]
    )
    def test_nothing_of_theirs_is_read(self, live: Callable[..., Live], method: str, path: str) -> None:
        server = live()
        for size in (10, 1 << 30):
            with server.connect() as raw:
                raw.sendall(head(method, path, server.port, size))  # and not a byte of it
                assert status(raw) == 401
        assert server.guard.bodies.used == 0

    def test_with_a_key_a_body_has_its_routes_limit(self, live: Callable[..., Live]) -> None:
        server = live()
        limits = server.service.limits
        for method, path, most in (
            ("POST", PATH, limits.body),
            ("PUT", "/v1/steerings/x", limits.upload),
            ("PUT", "/v1/models", bodies.SMALL),
            ("POST", "/v1/embeddings", bodies.SMALL),
            ("GET", "/v1/models", bodies.SMALL),
            ("POST", "/healthz", bodies.SMALL),
        ):
            with server.connect() as raw:
                raw.sendall(head(method, path, server.port, most + 1, **KEY))
                assert status(raw) == 413, path
        assert server.guard.bodies.used == 0

    def test_bodies_hold_so_much_together(self, live: Callable[..., Live]) -> None:
        server = live(limits={"total_bytes": 300_000})
        with ExitStack() as stack:
            for _ in range(2):
                raw = stack.enter_context(server.connect())
                raw.sendall(head("POST", PATH, server.port, 200_000, **KEY) + b" " * 140_000)
            until(lambda: server.guard.bodies.used == 280_000)
            response = httpx.post(f"{server.url}{PATH}", content=b" " * 50_000, headers=KEY, timeout=PATIENCE)
            assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
            assert server.ask().status_code == 200
        until(lambda: server.guard.bodies.used == 0)

    def test_their_lines_in_the_log_are_few(self, live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("trimtab.serve.guard.ANONYMOUS_LINES_PER_SECOND", 0.3)
        server = live()
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
            for _ in range(20):
                assert client.get("/v1/models").status_code == 401
        entries = server.lines()
        assert 3 <= len(entries) < 20
        assert {(line["event"], line["status"], line["key"]) for line in entries} == {("refused", 401, None)}
        server.guard._anonymous_limiter._permits = 2.0
        assert httpx.get(f"{server.url}/v1/models", timeout=PATIENCE).status_code == 401
        assert server.lines()[-1]["left_out"] > 0


class TestSlow:
    def test_a_head_has_its_time(self, live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
        server = live()
        with server.connect() as silent, server.connect() as half, server.connect() as again:
            half.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: ")
            again.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert status(again) == 200
            again.sendall(b"GET /healthz HTTP/1.1\r\nHost: ")
            for raw in (silent, half, again):
                rest = b""
                while piece := raw.recv(4096):  # the rest of an answer, what is wrong, and then the end
                    rest += piece
                assert b"HTTP/1.1 408 " in rest
                assert b"took longer" in rest
        assert server.ask().status_code == 200

    def test_a_connection_is_kept_until_another_needs_its_place(
        self, live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Clients that keep theirs for a few seconds, as they do, are never faster than the server in closing it."""
        monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
        server = live(most=2)
        asks = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        refused = head("POST", PATH, server.port, 100) + b" " * 60  # without a key: answered before its body has come

        def status_of(raw: socket.socket, sent: bytes) -> int:
            raw.sendall(sent)
            got = b""
            while not got.endswith(b"}"):
                got += raw.recv(4096) or b"}"
            return int(got.split()[1])

        with server.connect() as first, server.connect() as second:
            assert status_of(second, refused) == 401
            second.sendall(b" " * 40)
            assert status_of(first, asks) == 200
            time.sleep(0.5)  # longer than a head that has begun may take
            assert [status_of(raw, asks) for raw in (first, second)] == [200, 200]
            with server.connect() as more:
                assert status(more) == 503
            monkeypatch.setattr(connections, "IDLE_SECONDS", 0.0)
            with server.connect() as more:
                assert status_of(more, asks) == 200
            assert first.recv(4096) == b""  # which was asked nothing for longest
            assert status_of(second, asks) == 200

    def test_a_body_has_its_time(self, live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bodies, "SECONDS", 0.3)
        server = live()
        with server.connect() as raw:
            raw.sendall(head("POST", PATH, server.port, 100, **KEY) + b"{")
            assert status(raw) == 408

    def test_a_head_that_came_is_no_longer_waited_for(
        self, live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An answer may take longer than a head."""
        monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
        server = live()
        step = server.service.scheduler._batch.step
        server.service.scheduler._batch.step = lambda: (time.sleep(0.15), step())[1]
        assert server.ask(max_tokens=6).json()["usage"]["completion_tokens"] == 6

    def test_who_takes_nothing_of_the_answer_is_gone(
        self, live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connections, "READ_SECONDS", 0.3)
        server = live(limits={"max_tokens": 100})
        ask = {
            "model": "trimtab",
            "messages": [{"role": "user", "content": "Why?"}],
            "max_tokens": 100,
            "n": 8,
            "seed": 1,
        }
        data = json.dumps({**ask, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
        kind = {"Content-Type": "application/json"}
        with server.connect(SO_RCVBUF=1024) as raw:
            raw.sendall(head("POST", "/v1/chat/completions", server.port, len(data), **KEY, **kind) + data)
            until(lambda: [line["event"] for line in server.lines()] == ["begun", "ended"])
        last = server.lines()[-1]
        assert last["outcome"] in ("cancelled", "done")
        assert sum(last["tokens"]) > 0
        until(lambda: not server.server.server_state.connections)


class TestMany:
    def test_more_connections_than_there_may_be(self, live: Callable[..., Live]) -> None:
        server = live(most=8)
        with ExitStack() as stack:
            for _ in range(8):
                stack.enter_context(server.connect())
            until(lambda: len(server.server.server_state.connections) == 8)
            for _ in range(20):
                with server.connect() as raw:
                    assert status(raw) == 503
        until(lambda: not server.server.server_state.connections)
        assert server.ask().status_code == 200

    def test_files_that_may_be_open(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import resource

        was = resource.getrlimit(resource.RLIMIT_NOFILE)
        opened: list[Any] = []
        monkeypatch.setattr(resource, "setrlimit", lambda _what, limits: opened.append(limits))
        for soft, hard, wanted, room in (
            (1024, 4096, 512, 512),
            (256, 4096, 512, 512),
            (256, 300, 512, 300 - connections.SPARE),
            (256, 256, 512, 256 - connections.SPARE),
        ):
            monkeypatch.setattr(resource, "getrlimit", lambda _what, soft=soft, hard=hard: (soft, hard))
            assert connections.raise_file_limit(wanted) == room
        assert opened[0] == (512 + connections.SPARE, 4096)
        monkeypatch.undo()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == was


class TestNames:
    @pytest.mark.parametrize(
        ("host", "expected"),
        [
            ("localhost", 200), ("LOCALHOST:80", 200), ("localhost.", 200), ("localhost.:80", 200),
            ("[::1]", 200), ("[::1]:80", 200), ("localhost:80@evil", 403), ("evil.example", 403),
            ("127.0.0.1.evil.com", 403), ("", 403), ("localhost:x", 403), ("[::2]:80", 403),
        ],
    )  # fmt: skip
    def test_whom_it_answers_to(self, live: Callable[..., Live], host: str, expected: int) -> None:
        assert httpx.get(f"{live().url}/healthz", headers={"Host": host}, timeout=PATIENCE).status_code == expected


FIELDS = [
    b"Host: localhost\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: -1\r\n",
    b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Content-Type: application/json\r\n",
    b"Content-Encoding: gzip\r\n",
    b"Expect: 100-continue\r\n",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
    b"X: \xff\xfe\r\n",
    b": \r\n",
]


class TestNoise:
    def test_whatever_comes_the_server_goes_on(self, live: Callable[..., Live]) -> None:
        """Bytes that are no HTTP, and requests that are, of any head and body: nothing is the server's own fault."""
        server = live(policy=Policy())
        lines = st.sampled_from(
            [b"POST /v1/completions", b"GET /", b"PUT /v1/steerings/x", b"DELETE /v1/steerings/s0", b"X"]
        )
        version = st.sampled_from([b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b" HTTP/9\r\n", b"\r\n"])
        fields = st.lists(st.sampled_from(FIELDS), max_size=5)
        bodies_ = st.binary(max_size=40) | st.sampled_from(
            [b"{}", b"[]", b'{"a":', b'5\r\n{"a"}\r\n0\r\n\r\n', b"null"]
        )
        whole = st.builds(lambda a, b, c, d: a + b + b"".join(c) + b"\r\n" + d, lines, version, fields, bodies_)

        @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(data=whole | st.binary(max_size=200))
        def check(data: bytes) -> None:
            with server.connect() as raw:
                raw.sendall(data)
                raw.shutdown(socket.SHUT_WR)
                got = b""
                while more := raw.recv(65536):
                    got += more
                if got:
                    assert int(got.split()[1]) < 500, (data, got)

        check()
        assert httpx.post(f"{server.url}{PATH}", json=BODY, timeout=PATIENCE).status_code == 200
        until(lambda: server.guard.bodies.used == 0)  # which it is a moment after the answer was sent
        until(lambda: server.service.scheduler.running == server.service.scheduler.queued == 0)


def answer(raw: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    got = b""
    while more := raw.recv(65536):
        got += more
    return got


class TestHeads:
    """What heads say of themselves that a proxy and this server could read in two ways, or that asks for no answer."""

    def test_two_lengths_are_refused_and_end_the_connection(self, live: Callable[..., Live]) -> None:
        server = live(policy=Policy())
        inner = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"  # smuggled, for whoever reads the other length
        with server.connect() as raw:
            raw.sendall(head("POST", PATH, server.port, 3, **{"Transfer-Encoding": "chunked"}) + b"0\r\n\r\n" + inner)
            got = answer(raw)
        assert got.count(b"HTTP/1.1 ") == 1
        assert got.startswith(b"HTTP/1.1 400")
        assert b"Content-Length or Transfer-Encoding" in got

    def test_head_is_get_without_a_body(self, live: Callable[..., Live]) -> None:
        server = live(policy=Policy())
        for path in ("/healthz", "/readyz", "/v1/models"):
            got, whole = httpx.head(server.url + path, timeout=PATIENCE), httpx.get(server.url + path, timeout=PATIENCE)
            assert (got.status_code, got.content) == (200, b"")
            assert got.headers["content-length"] == str(len(whole.content))
        assert httpx.head(server.url + PATH, timeout=PATIENCE).status_code == 405

    def test_what_isnt_http_is_told_so_and_fills_no_log(
        self, live: Callable[..., Live], caplog: pytest.LogCaptureFixture
    ) -> None:
        server = live()
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50)  # of TLS
        upgrade = "GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: {}upgrade\r\nUpgrade: {}\r\n\r\n"
        with caplog.at_level("WARNING"):
            for data in (hello, b"GET /healthz HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", *[hello] * 60):
                with server.connect() as raw:
                    raw.sendall(data)
                    error = json.loads(answer(raw).rpartition(b"\r\n\r\n")[2])["error"]
                    assert error["type"] == "invalid_request_error" or error["code"] == "invalid_api_key"
            for to in ("websocket", "h2c"):
                with server.connect() as raw:
                    raw.sendall(upgrade.format("", to).encode())
                    assert status(raw) == 200
            with server.connect() as raw:  # refused before its body, which then is none
                raw.sendall(
                    head("POST", PATH, server.port, 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
                )
                assert status(raw) == 401
                raw.sendall(b"-5\r\nhello\r\n")
                answer(raw)
        assert sum("Invalid HTTP" in line for line in caplog.messages) <= 20
        assert not [line for line in caplog.messages if "Invalid HTTP" not in line]


def test_what_a_signal_asks_for_is_done_one_at_a_time_and_once_more() -> None:
    from trimtab.serve.run import coalescing_trigger

    gate, begun, running = threading.Event(), [], threading.Lock()

    def work() -> None:
        assert running.acquire(blocking=False)
        begun.append(len(begun))
        gate.wait(PATIENCE)
        running.release()
        raise OSError("the folder is gone")  # and the next time it is there again

    again = coalescing_trigger(work)
    again()
    until(lambda: begun)
    for _ in range(300):
        again()
    gate.set()
    until(lambda: len(begun) == 2 and not running.locked())
    again()
    until(lambda: len(begun) == 3 and not running.locked())


def test_shutting_down_waits_for_no_half_request(live: Callable[..., Live]) -> None:
    server = live()
    with server.connect() as half, server.connect() as started:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: ")
        started.sendall(head("POST", PATH, server.port, 100, **KEY) + b"{")
        until(lambda: server.guard.bodies.used == 1)
        server.server.handle_exit(15, None)
        assert status(started) == 503
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()
