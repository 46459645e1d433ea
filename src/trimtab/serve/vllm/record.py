"""A request to vLLM's server in the audit log: begun before the engine accepts it, ended before its end is sent."""

from __future__ import annotations

import threading
from typing import Any

from trimtab.engines.vllm.admitted import Ticket
from trimtab.serve.audit import Audit
from trimtab.serve.schema_told import AppliedSteering
from trimtab.serve.tasks import total_dose
from trimtab.serve.vllm.request import VllmRequest


class Record:
    """The audit log entries of a request, whose `ticket` counts the generated tokens.

    Args:
        audit: The log.
        who: The request's id, its key's name, the route.
        request: The request.
        steerings: The steerings that act on it.
    """

    def __init__(
        self, audit: Audit, who: dict[str, str], request: VllmRequest, steerings: list[AppliedSteering]
    ) -> None:
        self.ticket: Ticket | None = None
        self._audit = audit
        self._prompt = request.prompt
        self._line: dict[str, Any] = {
            **who,
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
        await self._audit.soon({"event": "begun", **self._line}, self._prompt)
        self._begun = True

    def end(self, outcome: str) -> None:
        """Write the last line. Raises `Refusal` if it can't be written. Only the first call counts."""
        with self._lock:
            if self._over or not self._begun:
                return
            self._over = True
        ticket = self.ticket
        self._count()
        tokens = {} if ticket is None else ticket.tokens
        doses = [] if ticket is None else [ticket.applied(answer) for answer in tokens]
        self._audit.write(
            {
                "event": "ended",
                **self._line,
                "prompt_tokens": [] if ticket is None else list(ticket.prompts.values()),
                "tokens": list(tokens.values()),
                "doses": [applied and applied.dose for applied in doses],
                "total_doses": [applied and total_dose(applied) for applied in doses],
                "outcome": outcome,
            }
        )

    def _count(self) -> None:
        if self.ticket is not None:
            self._line["emphasized_tokens"] = self.ticket.emphasized
