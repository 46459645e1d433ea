"""A server on this machine that speaks OpenAI's chat completions, and fails when it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Served:
    """A running server: what it was asked, and what it is to do with the next requests."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    faults: list[Callable[[BaseHTTPRequestHandler], None] | None] = field(default_factory=list)
    reply: Callable[[str], str] = lambda prompt: "Fine.\nScore: 7"


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def fails(status: int, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: send(handler, status, json.dumps({"error": {"message": "so it goes"}}).encode(), **headers)


def complete(handler: BaseHTTPRequestHandler, text: str) -> None:
    """A chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    document = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    send(handler, 200, json.dumps(document).encode())


@contextmanager
def serving() -> Iterator[Served]:
    """A server, for as long as the context is open."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.requests.append(data)
                state.keys.append(self.headers["Authorization"])
                state.times.append(time.monotonic())
                fault = state.faults.pop(0) if state.faults else None
            if self.path != "/v1/chat/completions":
                return send(self, 404, b"{}")
            if fault is not None:
                return fault(self)
            complete(self, state.reply(data["messages"][-1]["content"]))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    state = Served(f"http://127.0.0.1:{server.server_port}/v1")
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
