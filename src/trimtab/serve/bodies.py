"""Limits on request bodies: the size on each route, the time to arrive, and the memory of all together."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio
from starlette.types import Message, Receive, Scope

from trimtab.serve.playground.paths import JOIN, is_page
from trimtab.serve.refusals import Refusal

if TYPE_CHECKING:
    from trimtab.serve.service import Service

SECONDS = 30.0
"""Seconds in which a body must arrive."""
SMALL = 16 << 10
"""Bytes, for routes that need no body, and for requests of the page without a key."""
LOOK = 0.25
"""Seconds between checks whether the server is shutting down."""
ANSWERS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
STEERINGS = "/v1/steerings"


def body_limit(service: Service, method: str, path: str, *, known: bool) -> int:
    """The most bytes that a request's body may have on this route. `known`: the sender's key is known."""
    limits = service.limits
    if method == "PUT" and path.startswith(f"{STEERINGS}/"):
        return limits.upload if service.upload else SMALL
    if method == "POST" and path in ANSWERS:
        return limits.body
    if method == "POST" and path in (STEERINGS, f"{STEERINGS}/make"):
        return limits.body if service.learn else SMALL
    if method == "POST" and path == JOIN and is_page(path) and known:
        return limits.body
    return min(SMALL, limits.body)


class Bodies:
    """The memory of all bodies that are being read or answered, limited to `most` bytes."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0

    def release(self, size: int) -> None:
        """Release the memory of a request that is over."""
        self.used -= size

    async def read(self, scope: Scope, receive: Receive, limit: int, draining: Callable[[], bool]) -> bytes:
        """The whole body; the caller calls `let_go(len(…))`. Raises `Refusal` for one that is too large or too slow."""
        too_large = Refusal(413, f"the request's body can have at most {limit} bytes", code="too_large")
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared[:20]) > limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        until = time.monotonic() + SECONDS
        try:
            while True:
                message = await _next(receive, until, draining)
                if message["type"] != "http.request":
                    raise Refusal(400, "the client disconnected")
                part = message.get("body", b"")
                if part and self.used + len(part) > self.most:
                    raise Refusal(429, "the server has no memory left for more requests", code="busy", retry=1)
                self.used += len(part)
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
                if not message.get("more_body"):
                    return b"".join(parts)
        except BaseException:
            self.used -= size
            raise


async def _next(receive: Receive, until: float, draining: Callable[[], bool]) -> Message:
    """The next message. Raises `Refusal` if it takes too long, or if the server shuts down meanwhile."""
    while True:
        with anyio.move_on_after(LOOK):
            return await receive()
        if draining():
            raise Refusal(503, "the server is shutting down", code="shutting_down", retry=5)
        if time.monotonic() > until:
            raise Refusal(408, f"the request's body took longer than {SECONDS:g} s", code="too_slow")
