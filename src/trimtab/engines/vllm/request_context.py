"""What a server in front of the engine has decided about a request, passed on to the engine beside it.

A request context belongs to the asyncio task that answers a request, so no client can send one. If the server is
closed, the engine accepts nothing without one: a vLLM route that generates and that the server doesn't know gets an
error and no token.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from trimtab.engines.answer import Applied, Dose
from trimtab.engines.vllm.counting import DOSE, Measured
from trimtab.engines.vllm.emphasized import EMPHASIZED, EmphasisRequest, emphasis_of_spans
from trimtab.engines.vllm.wire import RESOLVED_KEY, STEERING_KEY
from trimtab.errors import TrimtabError
from trimtab.steering import Steering
from trimtab.text.spans import Span

CLOSED = "TRIMTAB_CLOSED"
"""The environment variable that tells every process of the server that nothing runs without a request context."""


@dataclass(eq=False)
class RequestContext:
    """A request that may generate, and its outcome.

    Args:
        steering: Everything that acts on it; `None` if nothing does.
        name: Equal for equal steerings; the key for looking up what was resolved earlier.
        cap: The maximum for the sum of the doses over all sites; `None`: no maximum.
        emphasis: What to emphasize in each prompt; `None`: nothing.
        begin: Awaited once, before the engine receives any part of the request. An exception in it ends the request.
    """

    steering: Steering | None
    name: str
    begin: Callable[[], Awaitable[None]]
    cap: float | None = None
    emphasis: EmphasisRequest | None = None
    begun: bool = False
    failed: str | None = None  # why a part of the request was ended with an error
    prompts: dict[str, int] = field(default_factory=dict)  # tokens, by the engine's id of each prompt
    tokens: dict[tuple[str, int], int] = field(default_factory=dict)  # generated tokens, by prompt and answer
    doses: dict[tuple[str, int], tuple[Dose, ...]] = field(default_factory=dict)  # likewise, if doses are capped
    emphasis_by_prompt: dict[str, Steering] = field(default_factory=dict)  # the emphasis of each prompt, as a steering
    emphasized: int = 0  # emphasized tokens, over all prompts

    async def start(self) -> None:
        """Called when the engine is about to receive the request, or another of its prompts."""
        if not self.begun:
            await self.begin()
            self.begun = True

    def record_emphasis(self, prompt: str, spans: Sequence[Span], layers: int) -> None:
        """Record that these spans of a prompt are emphasized, at all layers."""
        self.emphasis_by_prompt[prompt] = emphasis_of_spans(spans, layers)
        self.emphasized += sum(stop - start for start, stop in spans)

    def record_doses(self, answer: tuple[str, int], doses: Measured) -> None:
        """Record the doses of an answer so far."""
        self.doses[answer] = tuple(Dose(layer, ratio, count, kind) for layer, kind, ratio, count in doses)

    def record_output(self, output: Any, *, delta: bool) -> None:
        """Record what the engine has generated. With `delta`, the output has only the tokens since the last one."""
        self.prompts[output.request_id] = len(output.prompt_token_ids or ())
        for choice in output.outputs:
            at = (output.request_id, choice.index)
            self.tokens[at] = len(choice.token_ids) + (self.tokens.get(at, 0) if delta else 0)

    def edits(self, prompt: str) -> list[str]:
        """The edits that act on a prompt and its answers, as strings."""
        both = (self.steering, self.emphasis_by_prompt.get(prompt))
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


REQUEST_CONTEXT: ContextVar[RequestContext | None] = ContextVar("trimtab_request_context", default=None)
"""The context of the request that the current task answers. Tasks that it starts inherit it."""


def is_closed(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the server in front of this process's engine requires request contexts."""
    return environment.get(CLOSED) == "1"


def request_context_for(prompt: Any, params: Any) -> RequestContext | None:
    """The context of a request to the engine; `None` if there is none and none is needed.

    Raises `TrimtabError` if it is needed and missing, and for steering that bypasses it.
    """
    extra = getattr(params, "extra_args", None) or {}
    if RESOLVED_KEY in extra:
        raise TrimtabError(f"a request asks for steering as {STEERING_KEY!r}; only the server sets {RESOLVED_KEY!r}")
    request_context = REQUEST_CONTEXT.get()
    if request_context is None:
        if is_closed():
            raise TrimtabError("this server has a policy, which doesn't cover this route")
        return None
    if extra.get(STEERING_KEY) or extra.get(EMPHASIZED):
        raise TrimtabError("this server takes steering only as a field of the request")
    if hasattr(prompt, "request_id") or hasattr(prompt, "__anext__"):  # these have their own parameters
        raise TrimtabError("this server steers prompts of text and of tokens, not streams of input")
    return request_context
