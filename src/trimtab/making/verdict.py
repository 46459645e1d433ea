"""The verdict on a steering: its effect, compared with that of random directions, and its costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from trimtab.evaluate.decision import BETTER, LUCK, WORSE, verdict_of

LEAST_SHARE = 0.1
"""The minimum share of the system prompt's effect for a steering to work."""
MORE_LOOPS = 0.3
"""A steering that makes this many more answers repetitive breaks the model, however few the answers are."""
DOUBTFUL = 0.15
"""An increase above this is worth a caution, even if chance may explain it."""


@dataclass(frozen=True)
class Verdict:
    """What was measured on questions that weren't used for learning or choosing.

    The effect is that on the lead, in nats per token, of the wanted answers over the unwanted ones. If a system prompt
    produces the wanted ones, the effect is given as a share of that prompt's own, and costs are compared with the
    prompt's answers. A user's own data may have no such prompt; then the effect is given in nats per token, and costs
    are compared with the unsteered answers.

    Args:
        effect: The effect, as a share of the system prompt's effect, or in nats per token.
        low, high: Its 95 % interval (bootstrap over questions).
        random: The same for random directions of the same norm.
        p: How often chance alone does as well: the largest p-value of the exact paired tests, by question, against the
            unsteered model and against each random direction.
        questions: The number of test questions.
        loops: The share of its answers that are repetitive; `loops_before` is that of the answers it is compared with.
        loops_p: How often chance alone makes so many more of them repetitive (exact paired test, by question).
        perplexity: The median of its answers under the unsteered model, over that of the answers it is compared with.
        signs: The share of answers with one of the idea's words: unsteered, under the system prompt, steered. Empty if
            the idea has no such words.
        likelier: Without a system prompt: how much likelier it makes the wanted answers themselves, in nats per token.
            `None` with one.
    """

    effect: float
    low: float
    high: float
    random: tuple[float, ...]
    p: float
    questions: int
    loops: float
    loops_before: float
    loops_p: float
    perplexity: float
    signs: tuple[float, ...] = ()
    likelier: float | None = None

    @property
    def share(self) -> float | None:
        """Its share of the system prompt's effect; `None` if there is no such prompt."""
        return self.effect if self.likelier is None else None

    @property
    def holds(self) -> bool:
        """Whether it does what was wanted, better than chance and random directions, without breaking the text."""
        return not self.why_not

    @property
    def why_not(self) -> str:
        """The reason why it doesn't hold; empty if it does."""
        if verdict_of(self.p) != BETTER:
            return f"its effect {LUCK}, or from that of a random direction (p = {self.p:.2g})"
        if self.share is not None and self.share < LEAST_SHARE:
            return f"it has less than {LEAST_SHARE:.0%} of the system prompt's effect"
        if self.likelier is not None and self.likelier <= 0:
            return "it makes the unwanted answers less likely, but the wanted ones no more likely"
        if self.loops > self.loops_before + MORE_LOOPS or verdict_of(1.0, self.loops_p) == WORSE:
            return (
                f"{self.loops:.0%} of its answers are repetitive, and {self.loops_before:.0%} {self._before}"
                f" (p = {self.loops_p:.2g})"
            )
        return ""

    @property
    def caution(self) -> str:
        """What to look at before using a steering that holds; empty if there is nothing."""
        if not self.holds or self.loops <= self.loops_before + DOUBTFUL:
            return ""
        return (
            f"read some answers before you use it: more of them are repetitive than {self._before}, though that"
            f" {LUCK} (p = {self.loops_p:.2g})"
        )

    def lines(self) -> list[str]:
        """The verdict in words."""
        outcome = "it works" if self.holds else f"none: {self.why_not}"
        whose = "the unsteered answers" if self.share is None else "the system prompt's answers"
        text_lines = [
            f"verdict: {outcome}",
            f"effect: {self._effect}, on {self.questions} questions it hasn't seen; random directions {self._others};"
            f" p = {self.p:.2g}",
            f"cost: {self.loops:.0%} of answers are repetitive ({self._before} {self.loops_before:.0%});"
            f" perplexity {self.perplexity:.2f} times that of {whose}",
        ]
        if self.likelier is not None:
            text_lines.insert(2, "these pairs have no system prompt, so the steering's share of its effect is unknown")
        if self.signs:
            plain, *by_prompt, mine = self.signs
            prompted = f"under the system prompt {by_prompt[0]:.0%}, " if by_prompt else ""
            text_lines.append(f"its words appear in {mine:.0%} of answers ({prompted}unsteered {plain:.0%})")
        return [*text_lines, f"caution: {self.caution}"] if self.caution else text_lines

    def as_measured(self) -> dict[str, Any]:
        if self.likelier is None:
            figures = {"share_of_prompt": round(self.effect, 4)}
        else:
            figures = {"gain": round(self.effect, 4), "likelier": round(self.likelier, 4)}
        return {
            **figures,
            "interval": [round(self.low, 4), round(self.high, 4)],
            "random": [round(value, 4) for value in self.random],
            "p": float(f"{self.p:.3g}"),
            "questions": self.questions,
            "loops": round(self.loops, 4),
            "loops_p": float(f"{self.loops_p:.3g}"),
            f"loops_{'unsteered' if self.share is None else 'prompted'}": round(self.loops_before, 4),
            "perplexity_ratio": round(self.perplexity, 4) if isfinite(self.perplexity) else None,
            **({"signs": [round(value, 4) for value in self.signs]} if self.signs else {}),
            "holds": self.holds,
        }

    @property
    def _before(self) -> str:
        return "unsteered" if self.share is None else "under the system prompt"

    @property
    def _effect(self) -> str:
        if self.likelier is None:
            return f"{self.effect:.0%} of the system prompt's [{self.low:.0%}, {self.high:.0%}]"
        return (
            f"the wanted answers gain {self.effect:.2f} nats per token over the others [{self.low:.2f},"
            f" {self.high:.2f}], and are {abs(self.likelier):.2f}"
            f" {'more' if self.likelier > 0 else 'less'} likely themselves"
        )

    @property
    def _others(self) -> str:
        return _range(self.random, "%" if self.share is not None else "f")


def _range(values: Sequence[float], kind: str) -> str:
    low, high = (f"{value:.0%}" if kind == "%" else f"{value:.2f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
