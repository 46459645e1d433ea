"""The quality guard: a steering that makes answers comply by breaking them is not a good one.

Stolfo et al. (2410.12877, appendix) set a layer's accuracy to 0 if answers have a perplexity below 2.5 under GPT-2.
Here each limit is relative to the unsteered answers to the same prompts, under the model itself. This needs no second
model, and no absolute limit that one model passes and another never could.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from trimtab.evaluate.fluency import Fluency


@dataclass(frozen=True)
class Guard:
    """Limits on how much steering may change answers, each relative to the unsteered ones on the same items.

    - `perplexity`: the median perplexity may be at most this many times the unsteered median. Above, text breaks.
    - `certainty`: the median of log-perplexity may not fall below this share of the unsteered one. Below, text is
      repetitive, and each word follows from the last.
    - `repeated`: the mean share of repeated four-grams may exceed the unsteered one by this much.
    - `empty`: the share of empty answers may exceed the unsteered one by this much.
    - `cut`: the share of answers that the token limit ended may exceed the unsteered one by this much.

    `None` turns a limit off. Raises `ValueError` for a limit that isn't a number or makes no sense.
    """

    perplexity: float | None = 2.0
    certainty: float | None = 0.3
    repeated: float | None = 0.1
    empty: float | None = 0.05
    cut: float | None = 0.5

    def __post_init__(self) -> None:
        for name, lowest in (("perplexity", 1.0), ("certainty", 0.0), ("repeated", 0.0), ("empty", 0.0), ("cut", 0.0)):
            limit = getattr(self, name)
            if limit is not None and not lowest <= limit < math.inf:
                raise ValueError(f"the guard's limit {name!r} is a number from {lowest:g}, or None; got {limit!r}")

    def broken(self, steered: Sequence[Fluency], unsteered: Sequence[Fluency]) -> tuple[str, ...]:
        """The limits that these answers exceed, in words; empty if none. Item i of both lists is the same prompt.

        A perplexity of NaN counts as infinite: what can't be measured doesn't pass.
        """
        if len(steered) != len(unsteered) or not steered:
            raise ValueError(f"{len(steered)} steered answers and {len(unsteered)} unsteered ones can't be compared")
        reasons = [*self._perplexity(steered, unsteered)]
        rules: tuple[tuple[str, float | None, Callable[[Fluency], float]], ...] = (
            ("repeated four-grams", self.repeated, lambda answer: answer.repeated),
            ("empty answers", self.empty, lambda answer: answer.empty),
            ("answers cut off", self.cut, lambda answer: answer.cut),
        )
        for what, limit, measure in rules:
            steered_value, unsteered_value = mean(map(measure, steered)), mean(map(measure, unsteered))
            if limit is not None and steered_value > unsteered_value + limit + 1e-9:
                reasons.append(f"{what}: {steered_value:.0%}, unsteered {unsteered_value:.0%}")
        return tuple(reasons)

    def _perplexity(self, steered: Sequence[Fluency], unsteered: Sequence[Fluency]) -> list[str]:
        steered_value, unsteered_value = median_perplexity(steered), median_perplexity(unsteered)
        if steered_value is None or unsteered_value is None:
            return []  # all answers are empty: another limit covers that
        if self.perplexity is not None and steered_value > self.perplexity * unsteered_value:
            return [f"perplexity too high: {steered_value:.3g}, unsteered {unsteered_value:.3g}"]
        if self.certainty is not None and math.log(steered_value) < self.certainty * math.log(unsteered_value):
            return [f"perplexity too low: {steered_value:.3g}, unsteered {unsteered_value:.3g}"]
        return []


STANDARD = Guard()


def median_perplexity(answers: Sequence[Fluency]) -> float | None:
    """The median over answers that aren't empty; `None` if all are."""
    values = [
        math.inf if math.isnan(answer.perplexity) else answer.perplexity for answer in answers if not answer.empty
    ]
    return median(values) if values else None
