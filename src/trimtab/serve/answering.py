"""A request's answers over time: submitted, sent whole or as a stream, and cancelled when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from trimtab.serve.policy import Key
from trimtab.serve.records import Record
from trimtab.serve.refusals import Json, Refusal
from trimtab.serve.responses import ResponseWire, as_chat, as_responses, new_response_id
from trimtab.serve.responses_logprobs import TextTokens
from trimtab.serve.scheduler import Draining, QueueFull
from trimtab.serve.schema import ChatRequest, CompletionRequest
from trimtab.serve.schema_responses import LOGPROBS, ResponsesRequest
from trimtab.serve.service import Prepared, Service
from trimtab.serve.tasks import Event, Failed, Piece
from trimtab.serve.wire import CollectedAnswer, Wire, new_id
from trimtab.text.answer_parts import AnswerPart

STATUS = {"timeout": 504, "dose": 400, "input": 400, "shutdown": 503, "cancelled": 499, "server": 500}
CODES = {"dose": "dose_too_high", "timeout": "timeout", "shutdown": "shutting_down"}

Queue = asyncio.Queue[tuple[int, Event]]


async def answer_responses_request(service: Service, request: Request, body: ResponsesRequest) -> Any:
    """The response to a request to the Responses API, which is run as a chat. Raises like `answer`."""
    tokens = TextTokens(service.lm.tokenizer) if LOGPROBS in (body.include or ()) else None
    wire = ResponseWire(new_response_id(), body, tokens)
    try:
        return await answer(service, request, as_chat(body), wire)
    except Refusal as refusal:
        raise as_responses(refusal) from None


async def answer(
    service: Service, request: Request, body: ChatRequest | CompletionRequest, wire: ResponseWire | None = None
) -> Any:
    """The response to a request. Raises `Refusal` if it can't be answered, or if its answer failed."""
    key: Key = request.state.key
    chat = isinstance(body, ChatRequest)
    request.state.parsed = body
    prepared = await asyncio.to_thread(service.prepare, key, body)
    name = new_id(chat) if wire is None else wire.id
    audit_fields = {"request": request.state.request_id, "key": key.name, "route": request.url.path}
    record = Record(service, audit_fields, body, prepared, name)
    loop = asyncio.get_running_loop()
    queue: Queue = asyncio.Queue()

    def deliver(index: int) -> Callable[[Event], None]:
        def put(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server is shutting down
                loop.call_soon_threadsafe(queue.put_nowait, (index, event))

        return put

    for i, task in enumerate(prepared.tasks):
        task.deliver = record.wrap_deliver(i, deliver(i))
    try:
        service.scheduler.check_capacity(len(prepared.tasks))
        await record.begin()
        request.state.record = record  # the guard makes sure that it ends
        service.scheduler.submit(prepared.tasks)
    except QueueFull as full:
        record.drop("queue_full")
        raise Refusal(429, str(full), code="queue_full", retry=full.seconds) from None
    except Draining as draining:
        record.drop("shutting_down")
        raise Refusal(503, str(draining), code="shutting_down", retry=5) from None
    task = prepared.tasks[0]
    answer_wire = wire or Wire(
        name, body.model, chat, task.alternatives is not None, service.lm.tokenizer, task.monitors
    )
    answers = [CollectedAnswer(parser=prepared.shape.new_parser() if chat else None) for _ in prepared.tasks]
    run = _Run(service, request, body, prepared, answer_wire, answers, queue, record)
    if body.stream:
        first = await run.first()
        return StreamingResponse(
            run.stream(first), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
    return await run.whole()


@dataclass(eq=False)
class _Run:
    """A request in progress."""

    service: Service
    request: Request
    body: ChatRequest | CompletionRequest
    prepared: Prepared
    wire: Wire | ResponseWire
    answers: list[CollectedAnswer]
    queue: Queue
    record: Record
    _began: bool = False

    async def whole(self) -> Json:
        """Wait for all answers and return them. If the client disconnects, or one answer fails, all are cancelled."""
        disconnect = asyncio.ensure_future(wait_for_disconnect(self.request))
        outcome = "cancelled"
        try:
            while not self._complete:
                next_event = asyncio.ensure_future(self.queue.get())
                await asyncio.wait({next_event, disconnect}, return_when=asyncio.FIRST_COMPLETED)
                if not next_event.done():
                    next_event.cancel()
                    raise Refusal(499, "the client disconnected")
                self._take(*next_event.result())
            self._close("done")  # before sending: what can't be logged isn't sent
            return Json(self.wire.whole(self.prepared, self.answers))
        except Refusal as refusal:
            outcome = refusal.code or str(refusal.status)
            raise
        finally:
            disconnect.cancel()
            with suppress(Refusal):
                self._close(outcome)

    async def first(self) -> tuple[int, Event]:
        """Wait for the first event, so that an error still has its own status. The client may disconnect meanwhile."""
        disconnect = asyncio.ensure_future(wait_for_disconnect(self.request))
        next_event = asyncio.ensure_future(self.queue.get())
        outcome: str | None = "cancelled"
        try:
            await asyncio.wait({next_event, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not next_event.done():
                raise Refusal(499, "the client disconnected")
            index, event = next_event.result()
            if isinstance(event, Failed):
                outcome = event.kind
                raise _refusal(event)
            outcome = None
            return index, event
        finally:
            next_event.cancel()
            disconnect.cancel()
            if outcome is not None:
                with suppress(Refusal):
                    self._close(outcome)

    async def stream(self, first: tuple[int, Event]) -> AsyncIterator[bytes]:
        """Server-sent events. Closing the iterator, as happens when the client disconnects, cancels the answers."""
        outcome = "cancelled"
        try:
            for i in range(len(self.answers)):
                for chunk in self.wire.opening(i):
                    yield self.wire.encode(chunk)
            next_event = first
            while True:
                index, event = next_event
                answer = self.answers[index]
                before = len(answer.text)
                parts = self._take(index, event)
                if isinstance(event, Piece):
                    chunks = self.wire.piece(index, event, parts, before)
                else:
                    chunks = self.wire.ending(index, answer, parts)
                for chunk in chunks:
                    yield self.wire.encode(chunk)
                if self._complete:
                    break
                next_event = await self.queue.get()
            usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
            yield self.wire.encode(self.wire.last(self.prepared, self.answers, usage))
            self._close("done")
            yield self.wire.end
        except Refusal as refusal:  # the response has begun: send the error as an event
            outcome = refusal.code or str(refusal.status)
            for chunk in self.wire.failed(refusal):
                yield self.wire.encode(chunk)
            yield self.wire.end
        finally:
            with suppress(Refusal):
                self._close(outcome)

    @property
    def _complete(self) -> bool:
        return all(answer.done for answer in self.answers)

    def _take(self, index: int, event: Event) -> list[AnswerPart]:
        if isinstance(event, Failed):
            raise _refusal(event)
        if not self._began:
            self._began = True
            loop = asyncio.get_running_loop()
            self.service.metrics.first.observe(loop.time() - self.started)
        return self.answers[index].take(event)

    @property
    def started(self) -> float:
        task = self.prepared.tasks[0]
        return task.deadline - task.seconds  # both clocks are time.monotonic

    def _close(self, outcome: str) -> None:
        """Cancel answers that haven't ended, and log the outcome, once."""
        self.record.end(outcome)


async def wait_for_disconnect(request: Request) -> None:
    """Return when the client has disconnected."""
    while True:
        if (await request.receive())["type"] == "http.disconnect":
            return


def _refusal(failed: Failed) -> Refusal:
    return Refusal(STATUS[failed.kind], failed.message, code=CODES.get(failed.kind))
