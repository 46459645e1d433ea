"""Several requests of one user side by side, while they are answered.

They are treated like API requests: prepared under the policy, accepted all or none by the scheduler, decoded in one
batch, and logged in the audit log.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count

from trimtab.report.tokens import TokenCosines
from trimtab.serve.playground.callers import new_request_identity
from trimtab.serve.playground.choices import Request
from trimtab.serve.policy import Key
from trimtab.serve.records import Record, log_refusal
from trimtab.serve.refusals import Refusal
from trimtab.serve.scheduler import QueueFull
from trimtab.serve.schema import ChatRequest
from trimtab.serve.schema_output import AppliedSteering
from trimtab.serve.service import Prepared, Service
from trimtab.serve.tasks import Done, Event, Failed
from trimtab.serve.wire import CollectedAnswer, new_id


@dataclass
class Side:
    """One answer so far. `prompt` is its prompt's token ids, `steerings` the steerings that act on it.

    `cosines` are its tokens' cosines with the vectors used to color it. `number` is unique, so that answers can be
    distinguished when they are rendered again.
    """

    prompt: tuple[int, ...] = ()
    steerings: tuple[AppliedSteering, ...] = ()
    collected: CollectedAnswer = field(default_factory=CollectedAnswer)
    error: str = ""
    over: bool = False
    cosines: dict[str, TokenCosines] = field(default_factory=dict)
    number: int = field(default_factory=count(1).__next__)

    @property
    def text(self) -> str:
        """The text so far."""
        return self.collected.text

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token.id for token in self.collected.tokens)

    @property
    def done(self) -> Done | None:
        """How it ended, if it ended without an error."""
        return self.collected.done


class RequestGroup:
    """Requests that run together. `sides` are their answers, in the order of the requests."""

    def __init__(self, service: Service, key: Key, requests: Sequence[Request]) -> None:
        self.service = service
        self.key = key
        self.requests: list[Request] = list(requests)
        self.sides: list[Side] = [Side() for _ in requests]
        self._queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()

    def stop(self) -> None:
        """Cancel what hasn't ended, without waiting for it."""
        self._queue.put_nowait(None)

    async def run(self) -> AsyncGenerator[list[Side], None]:
        """Yield the sides whenever there is more. Closing the iterator cancels the answers.

        Raises before anything runs: `Refusal` for a request that can't run or isn't allowed, `QueueFull` and
        `Draining`.
        """
        service = self.service
        prepared = [await self._prepare(request) for request in self.requests]
        tasks = [ready.tasks[0] for ready in prepared]
        records = []
        for i, (side, ready, request) in enumerate(zip(self.sides, prepared, self.requests, strict=True)):
            side.prompt, side.steerings = ready.tasks[0].ids, tuple(ready.steerings)
            record = Record(
                service, new_request_identity(self.key), request, ready, new_id(isinstance(request, ChatRequest))
            )
            ready.tasks[0].deliver = record.wrap_deliver(0, self._deliver(i))
            records.append(record)
        service.scheduler.check_capacity(len(tasks))
        try:
            for record in records:
                await record.begin()
            service.scheduler.submit(tasks)
        except Exception as error:
            for record in records:
                record.drop("queue_full" if isinstance(error, QueueFull) else "failed")
            raise
        try:
            yield self.sides
            while not all(side.over for side in self.sides):
                update = await self._queue.get()
                if update is None:
                    return
                self._apply_event(*update)
                while not self._queue.empty():
                    if (update := self._queue.get_nowait()) is None:
                        return
                    self._apply_event(*update)
                yield self.sides
        finally:
            self._close(records)

    async def _prepare(self, request: Request) -> Prepared:
        try:
            return await asyncio.to_thread(self.service.prepare, self.key, request)
        except Refusal as refusal:
            log_refusal(self.service.audit, new_request_identity(self.key), self.key, refusal, request)
            raise

    def _deliver(self, number: int) -> Callable[[Event], None]:
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server is shutting down
                loop.call_soon_threadsafe(self._queue.put_nowait, (number, event))

        return deliver

    def _apply_event(self, number: int, event: Event) -> None:
        side = self.sides[number]
        if isinstance(event, Failed):
            side.error, side.over = event.message, True
        else:
            side.collected.take(event)
            side.over = isinstance(event, Done)

    def _close(self, records: list[Record]) -> None:
        for side, record in zip(self.sides, records, strict=True):
            with suppress(Refusal):
                record.end("done" if side.done else "failed" if side.error else "cancelled")
            side.over = True
