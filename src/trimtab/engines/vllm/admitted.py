"""What a server in front of the engine has decided about a request, passed on to the engine as a ticket.

A ticket belongs to the asyncio task that answers a request, so no client can send one. If the server is closed, the
engine accepts nothing without a ticket: a vLLM route that generates and that the server doesn't know gets an error and
no token.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from trimtab.engines.answer import Applied, Dose
from trimtab.engines.vllm.counting import DOSE, Measured
from trimtab.engines.vllm.emphasized import EMPHASIZED, Marked, towards
from trimtab.engines.vllm.wire import ASKED, RESOLVED
from trimtab.errors import TrimtabError
from trimtab.steering import Steering
from trimtab.text.spans import Span

CLOSED = "TRIMTAB_CLOSED"
"""The environment variable that tells every process of the server that nothing runs without a ticket."""


@dataclass(eq=False)
class Ticket:
    """A request that may generate, and its outcome.

    Args:
        steering: Everything that acts on it; `None` if nothing does.
        name: Equal for equal steerings; the key for looking up what was resolved earlier.
        cap: The maximum for the sum of the doses over all sites; `None`: no maximum.
        marked: What to emphasize in each prompt; `None`: nothing.
        begin: Awaited once, before the engine receives any part of the request. An exception in it ends the request.
    """

    steering: Steering | None
    name: str
    begin: Callable[[], Awaitable[None]]
    cap: float | None = None
    marked: Marked | None = None
    begun: bool = False
    failed: str | None = None  # why a part of the request was ended with an error
    prompts: dict[str, int] = field(default_factory=dict)  # tokens, by the engine's id of each prompt
    tokens: dict[tuple[str, int], int] = field(default_factory=dict)  # generated tokens, by prompt and answer
    doses: dict[tuple[str, int], tuple[Dose, ...]] = field(default_factory=dict)  # likewise, if doses are capped
    towards: dict[str, Steering] = field(default_factory=dict)  # the emphasis of each prompt, as a steering
    emphasized: int = 0  # emphasized tokens, over all prompts

    async def start(self) -> None:
        """Called when the engine is about to receive the request, or another of its prompts."""
        if not self.begun:
            await self.begin()
            self.begun = True

    def heed(self, prompt: str, spans: Sequence[Span], layers: int) -> None:
        """Record that these spans of a prompt are emphasized, at all layers."""
        self.towards[prompt] = towards(spans, layers)
        self.emphasized += sum(stop - start for start, stop in spans)

    def weigh(self, answer: tuple[str, int], doses: Measured) -> None:
        """Record the doses of an answer so far."""
        self.doses[answer] = tuple(Dose(layer, ratio, count, kind) for layer, kind, ratio, count in doses)

    def hear(self, output: Any, *, delta: bool) -> None:
        """Record what the engine has generated. With `delta`, the output has only the tokens since the last one."""
        self.prompts[output.request_id] = len(output.prompt_token_ids or ())
        for choice in output.outputs:
            at = (output.request_id, choice.index)
            self.tokens[at] = len(choice.token_ids) + (self.tokens.get(at, 0) if delta else 0)

    def edits(self, prompt: str) -> list[str]:
        """The edits that act on a prompt and its answers, as strings."""
        both = (self.steering, self.towards.get(prompt))
        return [str(edit) for each in both if each is not None for edit in each.edits if edit.strength != 0]

    def applied(self, answer: tuple[str, int]) -> Applied | None:
        """The edits and doses of an answer; `None` if edits acted and no dose was measured."""
        pushes = self.steering is not None and any(edit.strength for edit in self.steering.edits)
        if pushes and not self.doses.get(answer):
            return None
        return Applied(tuple(self.edits(answer[0])), self.doses.get(answer, ()))

    def fail(self, reason: str) -> None:
        """Record that a part of the request was ended with an error. The first error is the one that is reported."""
        self.failed = self.failed or reason

    @property
    def too_high(self) -> bool:
        """Whether the request was ended because the doses exceeded its cap."""
        return self.failed is not None and self.failed.startswith(DOSE)


TICKET: ContextVar[Ticket | None] = ContextVar("trimtab_ticket", default=None)
"""The ticket of the request that the current task answers. Tasks that it starts inherit it."""


def is_closed(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the server in front of this process's engine requires tickets."""
    return environment.get(CLOSED) == "1"


def ticket_for(prompt: Any, params: Any) -> Ticket | None:
    """The ticket of a request to the engine; `None` if there is none and none is needed.

    Raises `TrimtabError` if a ticket is needed and missing, and for steering that bypasses the ticket.
    """
    extra = getattr(params, "extra_args", None) or {}
    if RESOLVED in extra:
        raise TrimtabError(f"a request asks for steering as {ASKED!r}; only the server sets {RESOLVED!r}")
    ticket = TICKET.get()
    if ticket is None:
        if is_closed():
            raise TrimtabError("this server has a policy, which doesn't cover this route")
        return None
    if extra.get(ASKED) or extra.get(EMPHASIZED):
        raise TrimtabError("this server takes steering only as a field of the request")
    if hasattr(prompt, "request_id") or hasattr(prompt, "__anext__"):  # these have their own parameters
        raise TrimtabError("this server steers prompts of text and of tokens, not streams of input")
    return ticket
