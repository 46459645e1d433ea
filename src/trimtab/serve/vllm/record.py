"""A request to vLLM's server in the audit log: begun before the engine accepts it, ended before its end is sent."""

from __future__ import annotations

import threading
from typing import Any

from trimtab.engines.vllm.request_context import RequestContext
from trimtab.serve.audit import Audit
from trimtab.serve.schema_output import AppliedSteering
from trimtab.serve.tasks import total_dose
from trimtab.serve.vllm.request import VllmRequest


class Record:
    """The audit log entries of a request, whose `request_context` counts the generated tokens.

    Args:
        audit: The log.
        audit_fields: The request's id, its key's name, the route.
        request: The request.
        steerings: The steerings that act on it.
    """

    def __init__(
        self, audit: Audit, audit_fields: dict[str, str], request: VllmRequest, steerings: list[AppliedSteering]
    ) -> None:
        self.request_context: RequestContext | None = None
        self._audit = audit
        self._prompt = request.prompt
        self._line: dict[str, Any] = {
            **audit_fields,
            "model": request.model,
            "user": request.user,
            "steering": [steering.model_dump() for steering in steerings],
            "emphasized_tokens": 0,  # in the prompts that the engine has accepted
            "rejection": False,
        }
        self._lock = threading.Lock()
        self._begun = self._over = False

    async def begin(self) -> None:
        """Write the first line. Raises `Refusal` if it can't be written: then nothing may run."""
        self._count()
        await self._audit.write_async({"event": "begun", **self._line}, self._prompt)
        self._begun = True

    def end(self, outcome: str) -> None:
        """Write the last line. Raises `Refusal` if it can't be written. Only the first call counts."""
        with self._lock:
            if self._over or not self._begun:
                return
            self._over = True
        request_context = self.request_context
        self._count()
        tokens = {} if request_context is None else request_context.tokens
        doses = [] if request_context is None else [request_context.applied(answer) for answer in tokens]
        self._audit.write(
            {
                "event": "ended",
                **self._line,
                "prompt_tokens": [] if request_context is None else list(request_context.prompts.values()),
                "tokens": list(tokens.values()),
                "doses": [applied and applied.dose for applied in doses],
                "total_doses": [applied and total_dose(applied) for applied in doses],
                "outcome": outcome,
            }
        )

    def _count(self) -> None:
        if self.request_context is not None:
            self._line["emphasized_tokens"] = self.request_context.emphasized
