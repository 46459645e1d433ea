"""One request in the audit log: begun before any of it runs, ended once each of its answers has ended.

When a client disconnects, its rows don't end at once: the model's thread removes them, and then reports how many tokens
each had generated and what had steered it. So the last line is written when the last answer has ended, by whichever
thread learns of it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from trimtab.serve.audit import Audit
from trimtab.serve.monitored import fired_in
from trimtab.serve.policy import Key
from trimtab.serve.refusals import Refusal
from trimtab.serve.schema import ChatRequest, CompletionRequest, ImagePart, Message
from trimtab.serve.service import Prepared, Service
from trimtab.serve.tasks import Done, Event, Failed, total_dose


class Record:
    """The audit log entries of a request.

    Args:
        service: The server.
        audit_fields: The request's id, its key's name, the route.
        request: The request.
        prepared: Its tasks, in the order of its answers.
        id: The completion's id.
    """

    def __init__(
        self,
        service: Service,
        audit_fields: dict[str, str],
        request: ChatRequest | CompletionRequest,
        prepared: Prepared,
        id: str,
    ) -> None:
        self.service = service
        self._prepared = prepared
        self._prompt = (
            [_loggable_message(m) for m in request.messages] if isinstance(request, ChatRequest) else request.prompt
        )
        self._line: dict[str, Any] = {
            "request": audit_fields["request"],
            "id": id,
            "key": audit_fields["key"],
            "route": audit_fields["route"],
            "model": service.lm.name,
            "user": request.user,
            "steering": [steering.model_dump() for steering in prepared.steerings],
            "emphasized_tokens": prepared.emphasized,
            "rejection": prepared.tasks[0].rejection is not None,
            "prompt_tokens": prepared.lengths,
        }
        self._lock = threading.Lock()
        self._last: list[Done | Failed | None] = [None] * len(prepared.tasks)
        self._begun = False
        self._outcome: str | None = None
        self._written = False

    async def begin(self) -> None:
        """Write the first line. Raises `Refusal` if it can't be written: then nothing may run."""
        await self.service.audit.write_async({"event": "begun", **self._line}, self._prompt)
        self._begun = True

    def wrap_deliver(self, index: int, deliver: Callable[[Event], None]) -> Callable[[Event], None]:
        """Wrap an answer's `deliver` so that the answer's end is noted. The wrapper is called in the model's thread."""

        def deliver_and_record(event: Event) -> None:
            if isinstance(event, (Done, Failed)):
                with self._lock:
                    self._last[index] = event
                with suppress(Refusal):  # the log is failing then, and admits no new requests
                    self._write()
            deliver(event)

        return deliver_and_record

    def end(self, outcome: str) -> None:
        """End the request; answers that are still running are cancelled, and the line is written once they have ended.

        Raises `Refusal` if all have ended and the line can't be written. Only the first call counts.
        """
        with self._lock:
            if self._outcome is not None or not self._begun:
                return
            self._outcome = outcome
            left = [task for task, last in zip(self._prepared.tasks, self._last, strict=True) if last is None]
        if left:
            self.service.scheduler.cancel(left)
        self._write()

    def drop(self, outcome: str) -> None:
        """End a request whose answers were logged as begun but never accepted by the scheduler."""
        with self._lock:
            self._last = [event or Failed("cancelled", outcome) for event in self._last]
        with suppress(Refusal):
            self.end(outcome)

    def _write(self) -> None:
        with self._lock:
            if self._written or self._outcome is None or None in self._last:
                return
            self._written = True
            last = [event for event in self._last if event is not None]
        doses = [None if event.trace else event.applied for event in last]  # doses aren't measured with rejection
        self.service.audit.write(
            {
                "event": "ended",
                **self._line,
                "tokens": [event.tokens for event in last],
                "doses": [applied and applied.dose for applied in doses],
                "total_doses": [applied and total_dose(applied) for applied in doses],
                **({"fired": [fired_in(event) for event in last]} if self._prepared.tasks[0].monitors else {}),
                "outcome": self._outcome,
            }
        )


def _loggable_message(message: Message) -> dict[str, Any]:
    """A message in the form that is logged, with images replaced by their digests."""
    dumped = message.model_dump()
    if isinstance(message.content, list):
        for part, dumped_part in zip(message.content, dumped["content"], strict=True):
            if isinstance(part, ImagePart):
                digest = hashlib.sha256(part.image_url.url.encode("utf-8", "backslashreplace")).hexdigest()
                dumped_part["image_url"] = {"url": f"sha256:{digest}"}
    return dumped


def log_refusal(
    audit: Audit, audit_fields: dict[str, Any], key: Key | None, refusal: Refusal, request: Any = None
) -> None:
    """Log a refused request. The steering that it requested shows who is probing for what."""
    line = {"event": "refused", **audit_fields, "key": None if key is None else key.name}
    if request is not None:
        line["steering"] = [choice.model_dump(exclude_none=True) for choice in request.steering]
    with suppress(Refusal):  # the request is refused in any case
        audit.write({**line, "status": refusal.status, "code": refusal.code, "error": refusal.message[:300]})
