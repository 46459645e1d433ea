"""The response to a request to make a steering: whole, or as events that report the progress."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from trimtab.errors import TrimtabError
from trimtab.serve.answering import wait_for_disconnect
from trimtab.serve.described import steering_info
from trimtab.serve.making import Finished, Step, make_steering
from trimtab.serve.policy import Key
from trimtab.serve.refusals import Json, Refusal
from trimtab.serve.schema_steerings import ExampleAnswers, MakeRequest, MakeResponse, VerdictReport
from trimtab.serve.service import Service
from trimtab.serve.wire import END, event

log: logging.Logger = logging.getLogger("trimtab")

Steps = AsyncGenerator[Step | Finished, None]


async def respond_to_make(service: Service, request: Request, audit_fields: dict[str, str], body: MakeRequest) -> Any:
    """The response: status 201 if a steering was added, 200 if the verdict is none, and 200 for a stream.

    Raises `Refusal` and `TrimtabError` like `make_steering`; if the client disconnects, the making is cancelled.
    """
    key: Key = request.state.key
    steps = make_steering(service, key, audit_fields, body)
    first = await anext(steps)  # any problem with the request is raised here, while it can still have its own status
    if body.stream:
        events = _events(service, key, body.name, first, steps)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    last = asyncio.ensure_future(_wait_for_result(steps))
    disconnect = asyncio.ensure_future(wait_for_disconnect(request))
    try:
        await asyncio.wait({last, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not last.done():
            raise Refusal(499, "the client disconnected")
        finished = last.result()
    finally:
        disconnect.cancel()
        last.cancel()
    return Json(_response(service, key, body.name, finished).model_dump(), 200 if finished.loaded is None else 201)


async def _wait_for_result(steps: Steps) -> Finished:
    async with aclosing(steps):
        async for step in steps:
            if isinstance(step, Finished):
                return step
    raise AssertionError("the last step says what was made")


async def _events(service: Service, key: Key, name: str, first: Step | Finished, steps: Steps) -> AsyncIterator[bytes]:
    """Server-sent events. Closing the iterator, as happens when the client disconnects, cancels the making."""
    async with aclosing(steps):
        try:
            yield event(_event(service, key, name, first))
            async for step in steps:
                yield event(_event(service, key, name, step))
        except Refusal as refusal:  # the response has begun: send the error as an event
            yield event(refusal.body)
        except TrimtabError as error:
            yield event(Refusal(400, str(error)).body)
        except Exception as error:
            log.error("making a steering failed", exc_info=error)
            yield event(Refusal(500, "something went wrong inside the server; see its log").body)
        yield END


def _event(service: Service, key: Key, name: str, step: Step | Finished) -> dict[str, Any]:
    if isinstance(step, Finished):
        return _response(service, key, name, step).model_dump()
    return {"object": "steering.making", **vars(step)}


def _response(service: Service, key: Key, name: str, finished: Finished) -> MakeResponse:
    made, loaded = finished.made, finished.loaded
    return MakeResponse(
        name=name,
        added=loaded is not None,
        idea=made.idea,
        source=made.source,
        chosen=made.name,
        verdict=VerdictReport(**made.verdict.as_measured(), why_not=made.verdict.why_not, lines=made.verdict.lines()),
        examples=[ExampleAnswers(**vars(example)) for example in finished.examples],
        steering=None if loaded is None else steering_info(service.policy, key, loaded),
    )
