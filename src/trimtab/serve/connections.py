"""Connections, before there is a request: how many there are, how long a head may take, and who doesn't read.

uvicorn waits for the head of a request, and for a client to read its response, as long as they like. Here a head has
`HEAD_SECONDS`, from the connection's or its own first byte on, and gets an error when they are over; a client that
takes nothing of its response for `READ_SECONDS` is gone. Of uvicorn's two parsers it is always h11, which bounds a
head's size as well, to 16 KiB.

A connection on which a request was answered is kept for the next one, longer than clients and proxies keep theirs: the
side that closes first should be the one that asks. Closed from here, a connection may be gone when the next request is
on its way already, and its client hears nothing. Where there are as many connections as there may be, the one that
has had no request for longest makes room; where none has been idle for a while, one more is answered that the server is
busy.

What isn't HTTP is answered in the API's own form, and leaves few lines in the log. There is nothing to upgrade to: who
asks for that is answered in HTTP/1.1.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Iterable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from trimtab.serve.refusals import Refusal
from trimtab.serve.trickle import Few

HEAD_SECONDS = 10.0
READ_SECONDS = 60.0
KEEP_SECONDS = 75
"""More than the 60 that nginx and cloud balancers keep an idle connection for, and than any usual client."""
IDLE_SECONDS = 5.0
"""And no less than this, however many connections there are."""
INVALID = Few("Invalid HTTP request received.", rate=1.0)
"""uvicorn's line in the log for what isn't HTTP."""
SPARE = 64
"""Files that the process needs besides its connections."""


def protocol(most: int) -> type[asyncio.Protocol]:
    """uvicorn's protocol with these bounds, of `most` connections at a time."""
    logging.getLogger("uvicorn.error").addFilter(INVALID)

    class Bounded(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _begun = False  # whether a head is awaited that has begun, or that is the connection's first
        _reading: asyncio.TimerHandle | None = None
        _excess = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            held = [connection for connection in self.connections if not connection.transport.is_closing()]
            if len(held) > most and not _made_room(held, self.loop.time()):
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
            self._reading = self.loop.call_later(READ_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_reading()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_head()
            self._stop_reading()
            super().connection_lost(exc)

        @property
        def idle_since(self) -> float | None:
            """Since when no request is on it, or on its way; `None` where something is."""
            waiting = self.timeout_keep_alive_task or (None if self._begun else self._head)
            return None if waiting is None else waiting.when() - KEEP_SECONDS

        def _wait_for_head(self) -> None:
            """Begin to count where a head is awaited, and stop where one has come."""
            cycle = self.cycle
            if cycle is not None and not cycle.response_complete:
                self._stop_head()
                return
            # the rest of a body that nobody wanted may end long after its answer was sent: then nothing has begun
            begun = cycle is None or self.conn.their_state is not h11.IDLE or bool(self.conn.trailing_data[0])
            if self._head is None or begun > self._begun:
                self._stop_head()
                self._begun = begun
                self._head = self.loop.call_later(HEAD_SECONDS if begun else KEEP_SECONDS, self._too_slow)

        def _stop_head(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

        def _stop_reading(self) -> None:
            if self._reading is not None:
                self._reading.cancel()
                self._reading = None

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


def _made_room(held: Iterable[Any], now: float) -> bool:
    """Close the connection that has been idle for longest, if any has for a while."""
    idle = [(connection.idle_since, connection) for connection in held if connection.idle_since is not None]
    since, longest = min(idle, key=lambda pair: pair[0], default=(now, None))
    if longest is None or now - since < IDLE_SECONDS:
        return False
    longest.transport.close()
    return True


def room_for(wanted: int) -> int:
    """How many of so many connections the process may open files for, after raising its limit as far as it can."""
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


BUSY = Refusal(503, "the server has as many connections as it takes; try again", code="busy")
MALFORMED = Refusal(400, "this is no request in HTTP/1.1; for HTTPS or HTTP/2, put a proxy in front of this server")
LATE = Refusal(408, f"the head of the request took longer than {HEAD_SECONDS:g} s", code="too_slow")


def _raw(refusal: Refusal, reason: str) -> bytes:
    """A refusal on a connection on which there was no request yet; it is closed then."""
    body = bytes(refusal.response.body)
    head = [f"HTTP/1.1 {refusal.status} {reason}", "content-type: application/json", f"content-length: {len(body)}"]
    head += ["connection: close"] + ([] if refusal.retry is None else [f"retry-after: {refusal.retry}"])
    return ("\r\n".join(head) + "\r\n\r\n").encode() + body
