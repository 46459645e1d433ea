"""A record of the decisions of rejection at each token of an answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One generated token.

    `open` is whether steering was tried. `candidate` is the number of the accepted one (0 is the strongest), `None` if
    the unsteered logits decided. `replaced` is the id of the unsteered model's token if the emitted one differs, else
    `None`.
    """

    open: bool
    candidate: int | None
    replaced: int | None


@dataclass(frozen=True)
class Trace:
    """The steps of an answer, in the order of its tokens, and their cost.

    `candidates` describes each candidate, strongest first; `order` is the ranking of the layers, if there was one;
    `passes` counts the forward passes of the answer's batch, without prefill and ranking.
    """

    steps: tuple[Step, ...]
    candidates: tuple[str, ...]
    order: tuple[int, ...]
    schedule: str
    passes: int
    seconds_to_first: float = 0.0

    @property
    def open_share(self) -> float:
        """The share of tokens at which the gate was open."""
        return sum(step.open for step in self.steps) / max(1, len(self.steps))

    @property
    def changed_share(self) -> float:
        """The share of tokens that differ from the unsteered model's choice."""
        return sum(step.replaced is not None for step in self.steps) / max(1, len(self.steps))
