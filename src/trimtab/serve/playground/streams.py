"""End a page's open streams at shutdown; otherwise the server would wait for every page that is still open."""

from __future__ import annotations

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.serve.scheduler import Scheduler

LOOK = 0.25
"""Seconds between checks of the scheduler."""


async def run_until_drained(app: ASGIApp, scheduler: Scheduler, scope: Scope, receive: Receive, send: Send) -> None:
    """Run `app`, and end its response when the scheduler accepts nothing more and has answered everything."""
    begun, over = False, False

    async def tracking_send(message: Message) -> None:
        nonlocal begun, over
        begun = True
        over = message["type"] == "http.response.body" and not message.get("more_body")
        await send(message)

    async def watch(scope: anyio.CancelScope) -> None:
        idle = 0
        while idle < 4:  # the last output is still on its way to the page
            await anyio.sleep(LOOK)
            idle = idle + 1 if scheduler.draining and not (scheduler.running or scheduler.queued) else 0
        scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch, group.cancel_scope)
        await app(scope, receive, tracking_send)
        group.cancel_scope.cancel()
    if begun and not over:
        await send({"type": "http.response.body", "body": b"", "more_body": False})
