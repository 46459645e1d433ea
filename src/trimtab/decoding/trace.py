"""A record of the decisions of rejection at each token of an answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One generated token.

    `open` is whether the gate was open. `rung` is the accepted candidate (0 is the strongest), `None` if the unsteered
    logits decided. `replaced` is the id of the unsteered model's token if the emitted one differs, else `None`.
    """

    open: bool
    rung: int | None
    replaced: int | None


@dataclass(frozen=True)
class Trace:
    """The steps of an answer, in the order of its tokens, and their cost.

    `rungs` describes each candidate, strongest first; `order` is the ranking of the layers, if there was one; `passes`
    counts the forward passes of the answer's batch, without prefill and ranking.
    """

    steps: tuple[Step, ...]
    rungs: tuple[str, ...]
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
