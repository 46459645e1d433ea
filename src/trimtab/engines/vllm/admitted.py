"""What a server in front of the engine has decided of a request, on its way to the engine.

A ticket goes along with the task that answers a request, not in anything that a client could send. Where the server is
closed, the engine takes nothing without one: a route of vLLM's that generates, and that the server doesn't know, gets
an error and no token.
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
"""The variable that says, to be seen by every process of the server's, that nothing runs without a ticket."""


@dataclass(eq=False)
class Ticket:
    """A request that may generate, and what came of it.

    Args:
        steering: All that acts on it; `None`: nothing does.
        name: The same for the same steering, by which what was resolved is looked up.
        cap: What the doses of all sites may add up to; `None`: anything.
        marked: What of each prompt is emphasized; `None`: nothing.
        begin: Is awaited before the engine takes anything of the request, once. What it raises ends the request.
    """

    steering: Steering | None
    name: str
    begin: Callable[[], Awaitable[None]]
    cap: float | None = None
    marked: Marked | None = None
    begun: bool = False
    failed: str | None = None  # why a part of it was ended with an error
    prompts: dict[str, int] = field(default_factory=dict)  # tokens, by the engine's name of each prompt
    tokens: dict[tuple[str, int], int] = field(default_factory=dict)  # of each prompt's answers, by their number
    doses: dict[tuple[str, int], tuple[Dose, ...]] = field(default_factory=dict)  # likewise, where they are capped
    towards: dict[str, Steering] = field(default_factory=dict)  # what is emphasized of each prompt
    emphasized: int = 0  # tokens, of all prompts

    async def start(self) -> None:
        """The engine is about to take the request, or one more prompt of it."""
        if not self.begun:
            await self.begin()
            self.begun = True

    def heed(self, prompt: str, spans: Sequence[Span], layers: int) -> None:
        """Of a prompt these spans are emphasized, at all layers."""
        self.towards[prompt] = towards(spans, layers)
        self.emphasized += sum(stop - start for start, stop in spans)

    def weigh(self, answer: tuple[str, int], doses: Measured) -> None:
        """How hard an answer has been pushed so far."""
        self.doses[answer] = tuple(Dose(layer, ratio, count, kind) for layer, kind, ratio, count in doses)

    def hear(self, output: Any, *, delta: bool) -> None:
        """What the engine has generated; `delta`: since it was last heard of."""
        self.prompts[output.request_id] = len(output.prompt_token_ids or ())
        for choice in output.outputs:
            at = (output.request_id, choice.index)
            self.tokens[at] = len(choice.token_ids) + (self.tokens.get(at, 0) if delta else 0)

    def edits(self, prompt: str) -> list[str]:
        """What acts on a prompt and its answers, in words."""
        both = (self.steering, self.towards.get(prompt))
        return [str(edit) for each in both if each is not None for edit in each.edits if edit.strength != 0]

    def applied(self, answer: tuple[str, int]) -> Applied | None:
        """What acted on an answer, and how hard; `None` where something did and nothing of it was measured."""
        pushes = self.steering is not None and any(edit.strength for edit in self.steering.edits)
        if pushes and not self.doses.get(answer):
            return None
        return Applied(tuple(self.edits(answer[0])), self.doses.get(answer, ()))

    def fail(self, reason: str) -> None:
        """A part of it was ended with an error, the first of which is reported."""
        self.failed = self.failed or reason

    @property
    def too_high(self) -> bool:
        """Whether it was ended as the doses came to more than its cap."""
        return self.failed is not None and self.failed.startswith(DOSE)


TICKET: ContextVar[Ticket | None] = ContextVar("trimtab_ticket", default=None)
"""The ticket of the request that this task answers. Tasks that it starts have it as well."""


def is_closed(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the server in front of this process's engine lets nothing past itself."""
    return environment.get(CLOSED) == "1"


def ticket_for(prompt: Any, params: Any) -> Ticket | None:
    """The ticket of what is about to be given to the engine; `None` where there is none, and none is needed.

    Raises `TrimtabError` where one is needed, and for what would be steered past the ticket.
    """
    extra = getattr(params, "extra_args", None) or {}
    if RESOLVED in extra:
        raise TrimtabError(f"a request asks for steering as {ASKED!r}; {RESOLVED!r} is what the server makes of it")
    ticket = TICKET.get()
    if ticket is None:
        if is_closed():
            raise TrimtabError("this server has a policy, and this route isn't one that it knows")
        return None
    if extra.get(ASKED) or extra.get(EMPHASIZED):
        raise TrimtabError("this server takes steering as a field of the request, and no other way")
    if hasattr(prompt, "request_id") or hasattr(prompt, "__anext__"):  # these bring parameters of their own
        raise TrimtabError("this server steers prompts of text and of tokens, not streams of input")
    return ticket
