"""What an engine answers: the text, and what steered it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.decoding.trace import Trace
from trimtab.steering.attributes import OF_ANSWER, missing
from trimtab.steering.monitors import Monitored


@dataclass(frozen=True)
class Dose:
    """How hard one site was pushed in one request: `‖edit‖ / ‖activation‖`, mean over `tokens` steered tokens.

    `tokens` is a count. For the mean an engine may measure one generated token in several, which then stands for those
    since the last.
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

        Edits at several sites add up in the residual stream, and each is about as long as its dose says. This is how
        long they come to if their directions have nothing to do with each other, in lengths of the activation. The
        logits of routers and the keys of attention, which aren't added to the stream, aren't part of it.
        """
        return math.sqrt(sum(dose.ratio * dose.ratio for dose in self.doses if dose.kind not in ("router", "keys")))


@dataclass(frozen=True)
class Generation:
    """One answer.

    `token_ids` are the generated ids, the end-of-text token included; `finish_reason` is `"stop"`, `"length"`, or
    `"content_filter"` where a monitor ended it; `logprobs`, where requested, holds the natural log-probability of each
    generated token under the (steered) model before any sampling warp; `prompt_tokens` is the length of the rendered
    prompt; `trace` tells what rejection did at each token, where there was rejection; `pieces` is the text that each
    token adds, which join to `text`: on the transformers engine, where there are log-probabilities or a trace;
    `monitors` is what each monitor read, by name, where there were any.
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
            return missing(self, "an answer", name, OF_ANSWER)

    def _repr_html_(self) -> str:
        from trimtab.report.notebook import generation_html

        return str(generation_html(self))
