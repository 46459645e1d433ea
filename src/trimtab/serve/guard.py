"""What stands before the routes: who asks, how large the body is, which host was meant, and the count of requests.

The body is read here, whole and within its limit and time, before anything looks at it. The playground's paths, and no
others, go to the playground; they need no key, as the page asks for it and checks it itself.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.serve.playground.paths import HEADERS, is_page
from trimtab.serve.playground.streams import until_drained
from trimtab.serve.refusals import Refusal
from trimtab.serve.service import Service

OPEN = ("/healthz", "/readyz")
"""Paths that need no key."""
LOCAL = {"localhost", "127.0.0.1", "[::1]", "::1"}
BODY_SECONDS = 30.0


class Guard:
    """The outermost layer. `local`: the server is bound to a loopback address, and answers to its names only.

    That keeps a page in a browser on this machine from reaching it under a name of its own (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, service: Service, *, local: bool = False, page: ASGIApp | None = None) -> None:
        self.app = app
        self.page = page
        self.service = service
        self.local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        page = self.page is not None and is_page(scope["path"])
        state = scope.setdefault("state", {})
        state["request_id"] = f"req-{uuid.uuid4().hex}"
        state["began"] = time.perf_counter()

        async def out(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", state["request_id"].encode()),
                    (b"x-content-type-options", b"nosniff"),
                    *(HEADERS if page else ()),
                ]
            await send(message)

        try:
            try:
                self._admit(scope, state, page)
                inside = await self._body(scope, receive)
            except Refusal as refusal:
                await refusal.response(scope, receive, out)
                return
            if page and self.page is not None:
                await until_drained(self.page, self.service.scheduler, scope, inside, out)
            else:
                await self.app(scope, inside, out)
        finally:
            metrics = self.service.metrics
            found = None if page else scope.get("route")
            route = "playground" if page else getattr(found, "path", "other")
            metrics.requests.labels(route, str(status)).inc()
            metrics.seconds.labels(route).observe(time.perf_counter() - began)

    def _admit(self, scope: Scope, state: dict[str, Any], page: bool) -> None:
        headers = dict(scope["headers"])
        if self.local:
            host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0] if not _bare(headers) else "::1"
            if host not in LOCAL:
                raise Refusal(403, "this server is bound to this machine alone; ask for it as localhost")
        if page or scope["path"] in OPEN:
            return
        given = headers.get(b"authorization", b"").decode("latin-1")
        kind, _, secret = given.partition(" ")
        key = self.service.policy.caller(secret.strip() if kind.lower() == "bearer" else None)
        if key is None:
            raise Refusal(401, "give your API key as Authorization: Bearer …", code="invalid_api_key")
        state["key"] = key

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """A `receive` that gives the body at once, and afterwards tells when the client goes."""
        limits = self.service.limits
        limit = limits.upload if scope["method"] == "PUT" else limits.body
        too_large = Refusal(413, f"a request has {limit} bytes at most")
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared[:20]) > limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            with anyio.fail_after(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise Refusal(400, "the client went away")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise too_large
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise Refusal(408, f"the request's body took longer than {BODY_SECONDS:g} s") from None
        given = False

        async def inside() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": b"".join(parts), "more_body": False}
            return await receive()

        return inside


def _bare(headers: dict[bytes, bytes]) -> bool:
    """Whether the host is an IPv6 address without a port."""
    return headers.get(b"host", b"") == b"[::1]"
