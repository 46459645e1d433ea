"""The outermost layer: checks the API key, the Host header and the body's size, and counts requests.

No part of a body is read before the sender's key is known, and no more of it than its route allows. The playground's
paths, and no others, go to the playground. They need no key, since the page asks for it and checks it itself, but
without one they only accept small bodies.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import urlsplit

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.serve.access import AccessLog
from trimtab.serve.audit import Audit, unaudited
from trimtab.serve.bodies import Bodies
from trimtab.serve.playground.paths import HEADERS, JOIN, STREAMS, is_page
from trimtab.serve.policy import Key, Policy
from trimtab.serve.rate_limit import RateLimiter
from trimtab.serve.records import log_refusal
from trimtab.serve.refusals import Refusal
from trimtab.serve.service import Limits
from trimtab.serve.sieve import clean_json

OPEN = ("/healthz", "/readyz")
"""Paths that need no key."""
LOCAL = {"localhost", "127.0.0.1", "[::1]", "::1"}
CHANGES = ("POST", "PUT", "DELETE", "PATCH")
PAGE_STREAMS = 256
"""The most responses that pages may hold open at a time."""
ANONYMOUS_LINES_PER_SECOND = 10.0
"""Lines per second that requests without a key may leave in the audit log; the next line counts the omitted ones."""


class Guarded(Protocol):
    """What a guard needs from the server behind it, for any engine."""

    @property
    def policy(self) -> Policy: ...

    @property
    def audit(self) -> Audit: ...

    @property
    def access(self) -> AccessLog | None: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def draining(self) -> bool: ...

    def body_limit(self, method: str, path: str, *, known: bool) -> int: ...

    def count(self, route: str, status: int, seconds: float) -> None: ...


class Guard:
    """The outermost ASGI layer. `local`: the server is bound to a loopback address, and only accepts its names as Host.

    That keeps a page in a browser on this machine from reaching the server under another name (DNS rebinding).
    `run_page` runs the `page`, given the ASGI arguments; `public_paths` are the paths that need no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Guarded,
        *,
        local: bool = False,
        page: ASGIApp | None = None,
        run_page: Callable[..., Awaitable[None]] | None = None,
        public_paths: Collection[str] = OPEN,
    ) -> None:
        self.app = app
        self.page = page
        self.service = service
        self.local = local
        self.run_page = run_page or _plainly
        self.public_paths = public_paths
        self.bodies: Bodies = Bodies(service.limits.total_bytes)
        self._streams = 0
        self._anonymous_limiter = RateLimiter(ANONYMOUS_LINES_PER_SECOND)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        two_lengths = {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}
        page = self.page is not None and is_page(scope["path"])
        state = scope.setdefault("state", {})
        state["request_id"] = new_request_id()

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *_own(message.get("headers", []), page),
                    (b"x-request-id", state["request_id"].encode()),
                    (b"x-content-type-options", b"nosniff"),
                    *(HEADERS if page else ()),
                    *(((b"connection", b"close"),) if two_lengths else ()),
                ]
            await send(message)

        held = 0
        # every GET route accepts HEAD too: the server omits the body
        routed = {**scope, "method": "GET"} if scope["method"] == "HEAD" and not page else scope
        try:
            try:
                if two_lengths:  # a proxy in front may have used the other one
                    raise Refusal(400, "a request has either Content-Length or Transfer-Encoding; leave one out")
                self._admit(scope, state, page)
                limit = self.service.body_limit(scope["method"], scope["path"], known="key" in state)
                body = await self.bodies.read(scope, receive, limit, lambda: self.service.draining)
                held = len(body)
                if scope["method"] == "POST" and not page:
                    body = await anyio.to_thread.run_sync(clean_json, body)
            except Refusal as refusal:
                state["refused"] = refusal.without_frames()
                await refusal.response(scope, receive, send_with_headers)
                return
            inside = with_body(body, receive)
            if page and self.page is not None:
                await self._to_page(self.page, scope, inside, send_with_headers)
            else:
                await self.app(routed, inside, send_with_headers)
        finally:
            self.bodies.release(held)
            if (record := state.get("record")) is not None:
                with suppress(Refusal):
                    record.end("cancelled")  # if nothing else has: the client may disconnect before a stream begins
            elif status >= 400:
                self._write_down(scope, state, status)
            route = "playground" if page else getattr(routed.get("route"), "path", "other")
            self.service.count(route, status, time.perf_counter() - began)
            if self.service.access is not None:
                self.service.access.write(scope, state, status, time.perf_counter() - began)

    def _admit(self, scope: Scope, state: dict[str, Any], page: bool) -> None:
        headers = dict(scope["headers"])
        path, method = scope["path"], scope["method"]
        host = headers.get(b"host", b"").decode("latin-1")
        if self.local and _name(host) not in LOCAL:
            raise Refusal(
                403, "this server accepts only requests from this machine; address it as localhost", code="host"
            )
        if path in self.public_paths:
            return
        key = self._caller(headers)
        if key is not None:
            state["key"] = key
        if page:
            origin = headers.get(b"origin", b"").decode("latin-1")
            if method == "OPTIONS" or (self.local and origin and urlsplit(origin).netloc.lower() != host.lower()):
                raise Refusal(403, "requests from pages of other origins aren't allowed", code="origin")
        elif key is None:
            raise Refusal(401, "give your API key as Authorization: Bearer …", code="invalid_api_key")
        if method in CHANGES and (not page or path == JOIN) and not self.service.audit.check():
            raise unaudited()

    def _caller(self, headers: dict[bytes, bytes]) -> Key | None:
        header = headers.get(b"authorization", b"").decode("latin-1")
        kind, _, secret = header.partition(" ")
        return self.service.policy.caller(secret.strip() if kind.lower() == "bearer" else None)

    async def _to_page(self, page: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        held = STREAMS.fullmatch(scope["path"]) is not None
        if held and self._streams >= PAGE_STREAMS:
            await Refusal(503, "too many pages are open", code="busy", retry=10).response(scope, receive, send)
            return
        self._streams += held
        try:
            await self.run_page(page, scope, receive, send)
        finally:
            self._streams -= held

    def _write_down(self, scope: Scope, state: dict[str, Any], status: int) -> None:
        """Log a refusal, with the client's address; lines of requests without a key are limited in rate."""
        if not self.service.audit.on or scope["path"] in self.public_paths:
            return
        key: Key | None = state.get("key")
        client = scope.get("client")
        audit_fields = {
            "request": state["request_id"],
            "method": scope["method"],
            "route": scope["path"][:200],
            "client": client[0] if client else None,
        }
        if key is None:
            left_out = self._anonymous_limiter.acquire()
            if left_out is None:
                return
            audit_fields |= {"left_out": left_out} if left_out else {}
        stored = state.get("refused")
        refusal = stored if isinstance(stored, Refusal) else Refusal(status, "")
        log_refusal(self.service.audit, audit_fields, key, refusal, state.get("parsed"))


def new_request_id() -> str:
    """A new id for a request, for logs and its response."""
    return f"req-{uuid.uuid4().hex}"


async def _plainly(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


def with_body(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the whole body first, and then reports when the client disconnects."""
    left: list[bytes] = [body]

    async def inside() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return inside


def _own(headers: Any, page: bool) -> list[tuple[bytes, bytes]]:
    """The response's headers; the page's without those that allow other origins."""
    return [(name, value) for name, value in headers if not (page and name.lower().startswith(b"access-control-"))]


def _name(host: str) -> str:
    """The host name in a Host header: without the port and a trailing dot, in lower case."""
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdigit() or (":" in name and not name.startswith("[")):
        name = host
    return name.lower().rstrip(".")
