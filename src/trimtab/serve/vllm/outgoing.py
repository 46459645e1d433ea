"""A response of vLLM on its way out: held until the engine has accepted the request, then sent with what steered it.

A whole answer gets the field `trimtab`; a stream gets a last chunk with it before `[DONE]`, or in the Responses API
inside the event that ends it. The audit log's last line is written before that is sent.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from trimtab.engines.vllm.counting import FAILURE_PREFIX
from trimtab.engines.vllm.request_context import RequestContext
from trimtab.serve.refusals import Json, Refusal
from trimtab.serve.schema_output import AnswerReport, AppliedSteering, DoseReport, SteeringReport
from trimtab.serve.tasks import total_dose
from trimtab.serve.vllm.record import Record

DONE = b"data: [DONE]"
ENDS = (b"event: response.completed", b"event: response.incomplete", b"event: response.failed")
HEAD = ("id", "object", "created", "model")


class Outgoing:
    """The `send` of one response.

    Args:
        asgi: The scope, `receive` and `send` of the request.
        request_context: The request's context in the engine.
        record: The request's entries in the audit log.
        steerings: The steerings that act on it.
    """

    def __init__(
        self,
        asgi: tuple[Scope, Receive, Send],
        request_context: RequestContext,
        record: Record,
        steerings: list[AppliedSteering],
    ) -> None:
        self.refusal: Refusal | None = None
        """The response to send instead, if the engine was told not to accept the request."""
        self._asgi, self._send = asgi, asgi[2]
        self._request_context, self._record, self._steerings = request_context, record, steerings
        self._start: Message = {}
        self._buffered: list[bytes] = []
        self._rest = b""  # of a stream: an incomplete event
        self._sent = self._over = self._failed = self._disconnected = False
        self._head: dict[str, Any] = {}

    def watching(self, receive: Receive) -> Receive:
        """A `receive` that notes when the client disconnects; vLLM then aborts the request and sends no answer."""

        async def watched() -> Message:
            message = await receive()
            self._disconnected = self._disconnected or message["type"] == "http.disconnect"
            return message

        return watched

    async def __call__(self, message: Message) -> None:
        if self._over or self._disconnected:  # the guard logs that it was cancelled
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        kind = dict(self._start["headers"]).get(b"content-type", b"")
        if kind.startswith(b"text/event-stream"):
            await self._stream(body, more)
        else:
            self._buffered.append(body)
            if not more:
                await self._whole(b"".join(self._buffered))

    # ---- whole answers -------------------------------------------------------------------------------------

    async def _whole(self, body: bytes) -> None:
        status = self._start["status"]
        instead = self._replacement(status)
        try:
            if instead is not None:
                raise instead
            if status < 400:
                body = self._with_field(body)
            elif (error := _error_in(b"data: " + body)) is not None:  # for the audit log
                self._asgi[0]["state"]["refused"] = Refusal(status, str(error.get("message", "")))
            self._record.end("done" if status < 400 else str(status))
        except Refusal as refusal:
            await self._refuse(refusal)
            return
        headers = [(name, value) for name, value in self._start["headers"] if name != b"content-length"]
        self._start["headers"] = [*headers, (b"content-length", str(len(body)).encode())]
        await self._send_body(body, more=False)

    def _with_field(self, body: bytes) -> bytes:
        if not (body.startswith(b"{") and body.endswith(b"}") and len(body) > 2):
            raise Refusal(
                500, "vLLM's response isn't a JSON object, so its steering can't be reported; check --middleware"
            )
        return body[:-1] + b',"trimtab":' + _dumped(self._field()) + b"}"

    # ---- streams -------------------------------------------------------------------------------------------

    async def _stream(self, body: bytes, more: bool) -> None:
        self._rest += body
        *events, self._rest = self._rest.split(b"\n\n")
        if not more and self._rest.strip():
            events, self._rest = [*events, self._rest], b""
        if not self._sent:
            self._buffered += events
            if more and not self._request_context.begun:
                return  # nothing has been sent, so an error can still have its own status
            events, self._buffered = self._buffered, []
            error = next((failure for event in events if (failure := _error_in(event)) is not None), None)
            if (instead := self._replacement(200, error)) is not None:
                await self._refuse(instead)
                return
        out = []
        for event in events:
            out += self._with_summary(event)
        if out or not more:
            await self._send_body(b"".join(part + b"\n\n" for part in out), more=more)
        if not more:
            self._end_with("cut")  # if no end was among the events

    def _with_summary(self, event: bytes) -> list[bytes]:
        """What to send for an event: the event itself, with trimtab's summary if it ends the response."""
        if event.startswith(DONE):
            if self._failed:
                self._end_with("dose_too_high" if self._request_context.too_high else "server")
                return [event]
            last = {**self._head, "choices": [], "trimtab": self._field()}
            return [(self._end_with("done") or b"data: " + _dumped(last)), event]
        if event.startswith(ENDS):
            name, _, data = event.partition(b"\ndata: ")
            parsed = json.loads(data)
            parsed["response"]["trimtab"] = self._field()
            outcome = "done" if not name.endswith(b"failed") else "server"
            return [self._end_with(outcome) or name + b"\ndata: " + _dumped(parsed)]
        if not self._head and event.startswith(b"data: {"):
            parsed = json.loads(event[6:])
            self._head = {name: parsed[name] for name in HEAD if name in parsed}
        wrong = _error_in(event) is not None
        self._failed = self._failed or self._request_context.failed is not None or wrong
        return [b"data: " + _dumped(self._too_high().body) if wrong and self._request_context.too_high else event]

    def _end_with(self, outcome: str) -> bytes | None:
        """Write the log's last line; returns what to send instead of the end if that fails."""
        try:
            self._record.end(outcome)
        except Refusal as refusal:
            return b"data: " + _dumped(refusal.body)
        return None

    # ---- both ----------------------------------------------------------------------------------------------

    def _replacement(self, status: int, error: dict[str, Any] | None = None) -> Refusal | None:
        """The response to send instead of vLLM's response with this status, of which nothing has been sent.

        `error` is the error in its first events.
        """
        if self.refusal is not None:
            return self.refusal
        if self._request_context.too_high:
            return self._too_high()
        if error is not None:
            code = error.get("code")
            status = code if isinstance(code, int) and 400 <= code < 600 else 500
            return Refusal(status, str(error.get("message", "")), param=error.get("param"))
        if status < 400 and not self._request_context.begun:
            return Refusal(500, "vLLM answered, but its engine received no steering", code="unsteered")
        return None

    def _too_high(self) -> Refusal:
        return Refusal(400, (self._request_context.failed or "").removeprefix(FAILURE_PREFIX), code="dose_too_high")

    async def _refuse(self, refusal: Refusal) -> None:
        self._over = True
        self._asgi[0].setdefault("state", {})["refused"] = refusal
        try:
            self._record.end(refusal.code or str(refusal.status))
        except Refusal as unwritten:
            refusal = unwritten
        await refusal.response(*self._asgi)

    async def _send_body(self, body: bytes, *, more: bool) -> None:
        if not self._sent:
            self._sent = True
            await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    def _field(self) -> dict[str, Any]:
        request_context = self._request_context
        answers = [_applied(i, request_context, answer) for i, answer in enumerate(request_context.tokens)]
        return SteeringReport(
            steering=self._steerings, emphasized_tokens=request_context.emphasized, answers=answers
        ).model_dump()


def _applied(index: int, request_context: RequestContext, answer: tuple[str, int]) -> AnswerReport:
    """What steered one answer of a request."""
    applied = request_context.applied(answer)
    return AnswerReport(
        index=index,
        edits=request_context.edits(answer[0]),
        dose=None if applied is None else applied.dose,
        total_dose=None if applied is None else total_dose(applied),
        doses=[] if applied is None else [DoseReport(**asdict(dose)) for dose in applied.doses],
    )


def _error_in(event: bytes) -> dict[str, Any] | None:
    """The error in an event, if there is one."""
    if not event.startswith(b'data: {"error"'):
        return None
    try:
        error = json.loads(event[6:])["error"]
    except ValueError:
        return None
    return error if isinstance(error, dict) else {"message": str(error)}


def _dumped(value: Any) -> bytes:
    return bytes(Json({}).render(value))
