"""What an engine returns for a request: the answer, and what steered it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.decoding.trace import Trace
from trimtab.steering.attributes import ANSWER_HINTS, raise_missing_attribute
from trimtab.steering.monitors import Monitored


@dataclass(frozen=True)
class Dose:
    """How hard one site was steered in one request: the mean `‖edit‖ / ‖activation‖` over `tokens` steered tokens.

    `tokens` counts all steered tokens. For the mean, an engine may measure only every nth generated token, which then
    represents the tokens since the previous measurement.
    """

    layer: int
    ratio: float
    tokens: int
    kind: str = "residual"


@dataclass(frozen=True)
class Applied:
    """What steered one answer: the edits that acted, and the dose at each site (`‖edit‖ / ‖activation‖`)."""

    edits: tuple[str, ...]
    doses: tuple[Dose, ...]

    @property
    def dose(self) -> float:
        """The largest mean dose of any site; 0 when nothing was steered."""
        return max((dose.ratio for dose in self.doses), default=0.0)

    @property
    def dose_if_measured(self) -> float:
        """`dose`, and NaN where edits acted on an engine that doesn't measure doses."""
        return math.nan if self.edits and not self.doses else self.dose

    @property
    def overall(self) -> float:
        """The dose over all sites: the root of the sum of their squares; 0 when nothing was steered.

        Edits at several sites add up in the residual stream, each with a norm of about its dose. This is the relative
        norm of their sum if their directions are orthogonal. Doses of router logits and attention keys are left out,
        since those aren't added to the stream.
        """
        return math.sqrt(sum(dose.ratio * dose.ratio for dose in self.doses if dose.kind not in ("router", "keys")))


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: The answer's text.
        token_ids: The generated ids, including the end-of-text token.
        finish_reason: `"stop"`, `"length"`, or `"content_filter"` if a monitor ended the answer.
        prompt_tokens: The length of the rendered prompt.
        applied: What steered the answer.
        logprobs: If requested, the natural log-probability of each generated token under the (steered) model, before
            temperature, top-k and the like.
        trace: What rejection did at each token, if there was rejection.
        pieces: The text that each token adds; joined, they are `text`. On the transformers engine, if there are
            log-probabilities or a trace.
        monitors: What each monitor read, by name, if there were any.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    applied: Applied
    logprobs: tuple[float, ...] | None = None
    trace: Trace | None = None
    pieces: tuple[str, ...] | None = None
    monitors: Mapping[str, Monitored] | None = None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return raise_missing_attribute(self, "an answer", name, ANSWER_HINTS)

    def _repr_html_(self) -> str:
        from trimtab.report.notebook import generation_html

        return str(generation_html(self))
