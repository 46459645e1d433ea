"""Limits on connections: how many there are, how long the head of a request may take, and clients that don't read.

uvicorn waits indefinitely for the head of a request, and for a client to read its response. Here a head must be
complete within `HEAD_SECONDS` from the start of the connection or from its own first byte, or the client gets an error;
a connection whose client reads nothing of its response for `READ_SECONDS` is closed. Of uvicorn's two parsers this
always uses h11, which also limits the size of a head, to 16 KiB.

After a response, the connection is kept alive for longer than clients and proxies keep theirs: the client should be the
side that closes first. If the server closes a connection while the next request is on its way, the client gets no
response. At the limit on connections, the one that has been idle for longest is closed to make room; if none has been
idle for a while, the new one gets the response that the server is busy.

Input that isn't HTTP gets an error in the API's format, and few lines in the log. There is nothing to upgrade to:
upgrade requests are answered in HTTP/1.1.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from trimtab.serve.rate_limit import RateLimitFilter
from trimtab.serve.refusals import Refusal

try:
    import resource
except ImportError:  # Windows, which doesn't limit the number of files that way
    resource = None  # type: ignore[assignment]

HEAD_SECONDS = 10.0
READ_SECONDS = 60.0
KEEP_SECONDS = 75
"""More than the 60 s for which nginx and cloud load balancers keep an idle connection, and than any usual client."""
IDLE_SECONDS = 5.0
"""A connection must have been idle for at least this long to be closed for a new one."""
INVALID = RateLimitFilter("Invalid HTTP request received.", rate=1.0)
"""Limits uvicorn's log line for input that isn't HTTP."""
SPARE = 64
"""Files that the process needs besides its connections."""


def protocol(most: int) -> type[asyncio.Protocol]:
    """uvicorn's protocol with these limits, for at most `most` connections at a time."""
    logging.getLogger("uvicorn.error").addFilter(INVALID)

    class Bounded(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _begun = False  # whether the awaited head is partly here, or is the connection's first
        _read_timer: asyncio.TimerHandle | None = None
        _excess = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            held = [connection for connection in self.connections if not connection.transport.is_closing()]
            if len(held) > most and not _close_longest_idle(held, self.loop.time()):
                self._excess = True
                transport.write(_raw(BUSY, "Service Unavailable"))
                transport.close()
                return
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            if self._excess:
                return
            super().data_received(data)
            self._wait_for_head()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._read_timer = self.loop.call_later(READ_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._cancel_read_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_head()
            self._cancel_read_timer()
            super().connection_lost(exc)

        @property
        def idle_since(self) -> float | None:
            """Since when no request is in progress or arriving; `None` if there is one."""
            waiting = self.timeout_keep_alive_task or (None if self._begun else self._head)
            return None if waiting is None else waiting.when() - KEEP_SECONDS

        def _wait_for_head(self) -> None:
            """Start the timer when a head is awaited, and stop it when one has arrived."""
            cycle = self.cycle
            if cycle is not None and not cycle.response_complete:
                self._stop_head()
                return
            # the rest of an unread body may end long after its response was sent: that isn't the beginning of a head
            begun = cycle is None or self.conn.their_state is not h11.IDLE or bool(self.conn.trailing_data[0])
            if self._head is None or begun > self._begun:
                self._stop_head()
                self._begun = begun
                self._head = self.loop.call_later(HEAD_SECONDS if begun else KEEP_SECONDS, self._too_slow)

        def _stop_head(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

        def _cancel_read_timer(self) -> None:
            if self._read_timer is not None:
                self._read_timer.cancel()
                self._read_timer = None

        def _should_upgrade(self) -> bool:
            return False

        def send_400_response(self, msg: str) -> None:
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                self.transport.write(_raw(MALFORMED, "Bad Request"))
            self.transport.close()

        def _too_slow(self) -> None:
            self._head = None
            if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
                if self._begun and self.conn.their_state is h11.IDLE:
                    self.transport.write(_raw(LATE, "Request Timeout"))
                self.transport.close()

    return Bounded


def _close_longest_idle(held: Iterable[Any], now: float) -> bool:
    """Close the connection that has been idle for longest, if it has been for `IDLE_SECONDS`; whether it did."""
    idle = [(connection.idle_since, connection) for connection in held if connection.idle_since is not None]
    since, longest = min(idle, key=lambda pair: pair[0], default=(now, None))
    if longest is None or now - since < IDLE_SECONDS:
        return False
    longest.transport.close()
    return True


def raise_file_limit(wanted: int) -> int:
    """How many of `wanted` connections the process may open files for, after raising its limit as far as possible.

    All of them on Windows, which has no such limit.
    """
    if resource is None:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + SPARE
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        except (OSError, ValueError):
            most = soft
        return max(1, min(wanted, most - SPARE))
    return wanted


BUSY = Refusal(503, "the server has reached its connection limit; try again", code="busy")
MALFORMED = Refusal(400, "not an HTTP/1.1 request; for HTTPS or HTTP/2, put a proxy in front of this server")
LATE = Refusal(408, f"the request's headers took longer than {HEAD_SECONDS:g} s", code="too_slow")


def _raw(refusal: Refusal, reason: str) -> bytes:
    """The bytes of a refusal on a connection without a request; the connection is closed afterwards."""
    body = bytes(refusal.response.body)
    head = [f"HTTP/1.1 {refusal.status} {reason}", "content-type: application/json", f"content-length: {len(body)}"]
    head += ["connection: close"] + ([] if refusal.retry is None else [f"retry-after: {refusal.retry}"])
    return ("\r\n".join(head) + "\r\n\r\n").encode() + body
