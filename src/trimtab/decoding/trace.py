"""What rejection did at each token of an answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One generated token. `rung` is the rung accepted (0 is the strongest), `None` where the raw logits decided.

    `replaced` is the id of the raw model's token, where the emitted one is another.
    """

    open: bool
    rung: int | None
    replaced: int | None


@dataclass(frozen=True)
class Trace:
    """The steps of an answer, in the order of its tokens, and what they cost.

    `rungs` describes each rung, strongest first; `order` is the ranking of the layers, where there was one; `passes`
    counts the forward passes of the batch that the answer was part of, the prompt's and the ranking's not included.
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
        """The share of tokens that differ from the raw model's choice."""
        return sum(step.replaced is not None for step in self.steps) / max(1, len(self.steps))
