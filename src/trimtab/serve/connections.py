"""Connections, before there is a request: how many there are, how long a head may take, and who doesn't read.

uvicorn waits for the head of a request, and for a client to read its response, as long as they like. Here a head has
`HEAD_SECONDS`, from the connection's or its own first byte on, and a client that takes nothing of its response for
`READ_SECONDS` is gone. Beyond so many connections one more is told that the server is busy, and closed. Of uvicorn's
two parsers it is always h11, which bounds a head's size as well, to 16 KiB.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from trimtab.serve.refusals import Refusal

HEAD_SECONDS = 10.0
READ_SECONDS = 60.0
SPARE = 64
"""Files that the process needs besides its connections."""


def protocol(most: int) -> type[asyncio.Protocol]:
    """uvicorn's protocol with these bounds, of `most` connections at a time."""

    class Bounded(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _reading: asyncio.TimerHandle | None = None
        _excess = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                self._excess = True
                transport.write(_busy())
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

        def _wait_for_head(self) -> None:
            """Begin to count where a head is awaited, and stop where one has come."""
            cycle = self.cycle
            if cycle is not None and not cycle.response_complete:
                self._stop_head()
            elif self._head is None:
                self._head = self.loop.call_later(HEAD_SECONDS, self._too_slow)

        def _stop_head(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

        def _stop_reading(self) -> None:
            if self._reading is not None:
                self._reading.cancel()
                self._reading = None

        def _too_slow(self) -> None:
            self._head = None
            if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
                self.transport.close()

    return Bounded


def room_for(wanted: int) -> int:
    """How many of so many connections the process may open files for, having asked the system for as many as it can."""
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


def _busy() -> bytes:
    body = Refusal(503, "the server has as many connections as it takes; try again", code="busy").response.body
    head = f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}retry-after: 5\r\nconnection: close\r\n\r\n".encode() + bytes(body)
