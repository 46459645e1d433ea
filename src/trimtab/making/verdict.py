"""What a steering is worth: its share of the system prompt's effect, beside random directions, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

LEAST_SHARE = 0.1
"""Less of the system prompt's effect than this isn't worth a file."""
MORE_LOOPS = 0.15
"""A steering under which so many more answers go in circles than under the system prompt breaks the model."""


@dataclass(frozen=True)
class Verdict:
    """What was measured on questions that nothing was learned from or chosen by.

    Args:
        share: The part of the system prompt's effect that it has: of the lead, in nats a token, of the wanted answers
            over the unwanted ones.
        low, high: The 95 % interval of that (bootstrap over questions).
        random: The same for random directions of the same length.
        questions: How many were asked.
        loops: The share of its answers that go in circles; `loops_prompted` that under the system prompt.
        perplexity: The median of its answers under the unsteered model, over that of the system prompt's answers.
        signs: The share of answers with one of the idea's words: unsteered, under the system prompt, steered. Empty
            where the idea has no such words.
    """

    share: float
    low: float
    high: float
    random: tuple[float, ...]
    questions: int
    loops: float
    loops_prompted: float
    perplexity: float
    signs: tuple[float, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether it does what was wanted, beyond doubt and beyond any other direction, and leaves the text whole."""
        return (
            self.low > max(0.0, *self.random)
            and self.share >= LEAST_SHARE
            and self.loops <= self.loops_prompted + MORE_LOOPS
        )

    @property
    def why_not(self) -> str:
        """What speaks against it; empty if it holds."""
        if self.low <= max(0.0, *self.random):
            return "its effect can't be told from none, or from that of a random direction"
        if self.share < LEAST_SHARE:
            return f"it has less than {LEAST_SHARE:.0%} of the system prompt's effect"
        if self.loops > self.loops_prompted + MORE_LOOPS:
            return (
                f"{self.loops:.0%} of its answers go in circles, and {self.loops_prompted:.0%} under the system prompt"
            )
        return ""

    def lines(self) -> list[str]:
        """The verdict in words."""
        yes = "it holds" if self.holds else f"none: {self.why_not}"
        said = [
            f"verdict: {yes}",
            f"effect: {self.share:.0%} of the system prompt's [{self.low:.0%}, {self.high:.0%}], on {self.questions}"
            f" questions it hasn't seen; random directions {_range(self.random)}",
            f"cost: {self.loops:.0%} of answers go in circles (under the system prompt {self.loops_prompted:.0%});"
            f" perplexity {self.perplexity:.2f} times that of the system prompt's answers",
        ]
        if self.signs:
            plain, told, mine = self.signs
            said.append(
                f"its words stand in {mine:.0%} of answers (under the system prompt {told:.0%}, unsteered {plain:.0%})"
            )
        return said

    def as_measured(self) -> dict[str, Any]:
        """For the card."""
        return {
            "share_of_prompt": round(self.share, 4),
            "interval": [round(self.low, 4), round(self.high, 4)],
            "random": [round(one, 4) for one in self.random],
            "questions": self.questions,
            "loops": round(self.loops, 4),
            "loops_prompted": round(self.loops_prompted, 4),
            "perplexity_ratio": round(self.perplexity, 4) if isfinite(self.perplexity) else None,
            **({"signs": [round(one, 4) for one in self.signs]} if self.signs else {}),
            "holds": self.holds,
        }


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.0%}" if round(low, 2) == round(high, 2) else f"{low:.0%} to {high:.0%}"
