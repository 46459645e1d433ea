"""The layer between the page's routes and Gradio: it checks requests, and drops results that nobody reads.

Gradio keeps what its functions return for a session until somebody reads it, and a session is any text that a client
makes up. Here the number of sessions without a reader is limited, and they are dropped after a while, with the work in
progress for them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any
from urllib.parse import parse_qs

import gradio.queueing
from fastapi import FastAPI
from gradio import Blocks
from starlette.types import Receive, Scope, Send

from trimtab.serve.guard import with_body
from trimtab.serve.playground.paths import DATA, JOIN
from trimtab.serve.refusals import Refusal
from trimtab.serve.sieve import no_constant

SESSIONS = 64
"""The most sessions without a reader that have work in progress or results."""
EVENTS = 32
"""The most requests that one session may have waiting."""
UNREAD = 30.0
"""Seconds after which unread results are dropped."""
MESSAGES = 256
"""Messages after which they are dropped at once."""
STATE_CAPACITY = 256
"""Conversations that are kept, one per open page; the oldest is dropped first."""
TRACEBACKS = 6
"""Tracebacks per minute that the page's functions may leave in the server's log."""
FORWARDED_FIELDS = ("data", "event_data", "fn_index", "trigger_id", "session_hash")
log: logging.Logger = logging.getLogger("trimtab")


class PageApp:
    """The page as an ASGI application; enter `lifespan()` with the server's.

    The whole body of a request must be in its first message: see `Guard`.
    """

    def __init__(self, app: FastAPI, blocks: Blocks) -> None:
        self.app = app
        self.blocks = blocks
        self.sessions: Sessions = Sessions(blocks)
        # Gradio would print a traceback for anything that a client makes up
        gradio.queueing.traceback = _Few()  # type: ignore[assignment]

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Gradio's own lifespan, with the task that drops unread sessions."""
        async with self.app.router.lifespan_context(self.app):
            sweeping = asyncio.ensure_future(self.sessions.sweep())
            try:
                yield
            finally:
                sweeping.cancel()
                with suppress(asyncio.CancelledError):
                    await sweeping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"] == JOIN:
                receive = self._join((await receive())["body"], receive)
        except Refusal as refusal:
            scope["state"]["refused"] = refusal
            await refusal.response(scope, receive, send)
            return
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        if scope["path"] == DATA:
            with self.sessions.read(session):
                await self.app(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _join(self, body: bytes, receive: Receive) -> Receive:
        checked = _checked(body, self.blocks)
        self.sessions.join(checked["session_hash"])
        return with_body(json.dumps(checked).encode(), receive)


class Sessions:
    """Which sessions have work or results, and who reads them."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self._readers: Counter[str] = Counter()
        self._seen: dict[str, float] = {}

    @property
    def unread_sessions(self) -> list[str]:
        """The sessions that have work or results, and no reader."""
        queue = self.blocks._queue
        waiting = {name for name, events in queue.pending_event_ids_session.items() if events}
        with_results = {name for name, messages in queue.pending_messages_per_session.items() if messages.qsize()}
        return sorted(name for name in waiting | with_results if not self._readers[name])

    def join(self, session: str) -> None:
        """Note a request of a session. Raises `Refusal` if there are too many already."""
        if len(self.blocks._queue.pending_event_ids_session.get(session, ())) >= EVENTS:
            raise Refusal(429, "this page has too many unread answers", code="busy", retry=5)
        unread = self.unread_sessions
        if session not in unread and not self._readers[session] and len(unread) >= SESSIONS:
            raise Refusal(429, "too many pages have unread answers", code="busy", retry=5)
        self._seen[session] = time.monotonic()

    @contextmanager
    def read(self, session: str) -> Iterator[None]:
        """Mark the session as read while the context is open."""
        self._readers[session] += 1
        try:
            yield
        finally:
            self._readers[session] -= 1
            self._seen[session] = time.monotonic()
            if not self._readers[session]:
                del self._readers[session]

    async def sweep(self) -> None:
        """Drop what nobody reads, every second."""
        while True:
            await asyncio.sleep(1.0)
            try:
                await self.drop_unread()
            except Exception as error:
                log.error("unread answers of the page couldn't be dropped", exc_info=error)

    async def drop_unread(self) -> None:
        """Drop results that have been unread for too long, or that have become too many."""
        queue = self.blocks._queue
        now = time.monotonic()
        unread = self.unread_sessions
        for session in unread:
            messages = queue.pending_messages_per_session.get(session)
            many = messages is not None and messages.qsize() > MESSAGES
            if many or now - self._seen.setdefault(session, now) > UNREAD:
                await queue.clean_events(session_hash=session)
                queue.pending_event_ids_session.pop(session, None)
                if session in queue.pending_messages_per_session:
                    del queue.pending_messages_per_session[session]
                self._seen.pop(session, None)
        for session in self._seen.keys() - set(unread) - set(self._readers):
            if now - self._seen[session] > UNREAD:
                del self._seen[session]


def _checked(body: bytes, blocks: Blocks) -> dict[str, Any]:
    """The request of a page. Raises `Refusal` for anything that no page sends."""
    try:
        parsed = json.loads(body, parse_constant=no_constant)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise Refusal(400, "the request must be a JSON object")
    session, number, data = parsed.get("session_hash"), parsed.get("fn_index"), parsed.get("data")
    if not isinstance(session, str) or not re.fullmatch("[A-Za-z0-9]{1,64}", session):
        raise Refusal(400, "a session consists of at most 64 letters and digits", param="session_hash")
    function = blocks.fns.get(number) if type(number) is int else None
    if function is None or function.fn is None:
        raise Refusal(400, "the page has no such function", param="fn_index")
    if not isinstance(data, list) or len(data) != len(function.inputs):
        raise Refusal(400, f"this function takes {len(function.inputs)} values", param="data")
    return {name: parsed[name] for name in FORWARDED_FIELDS if name in parsed}


class _Few:
    """Replaces Gradio's `traceback`: the first few per minute are logged, the others counted."""

    def __init__(self) -> None:
        self._began = 0.0
        self._count = 0

    def print_exc(self, *_: Any, **__: Any) -> None:
        now = time.monotonic()
        if now - self._began > 60:
            if self._count > TRACEBACKS:
                log.error("and %d more of the playground's functions failed", self._count - TRACEBACKS)
            self._began, self._count = now, 0
        self._count += 1
        if self._count <= TRACEBACKS:
            log.error("a function of the playground failed", exc_info=True)
