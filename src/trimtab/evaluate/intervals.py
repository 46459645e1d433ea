"""How sure a difference is: the paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it, in the unit of the data."""

    estimate: float
    low: float
    high: float


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float] | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap interval of a mean, or of the mean of `after - before`.

    Item i of both is the same prompt, so pairs are drawn and what makes some prompts harder than others drops out.
    Passes and failures as 1 and 0 give the difference of two proportions. The same seed gives the same interval.
    When all differences are equal the interval has no width: the bootstrap can't see what it never drew.

    Raises `ValueError` for no items, lists of different length, or a level outside 0 … 1.
    """
    values = np.asarray(before, dtype=np.float64)
    if after is not None:
        if len(after) != len(before):
            raise ValueError(f"{len(before)} items before and {len(after)} after: pairs need as many of both")
        values = np.asarray(after, dtype=np.float64) - values
    if not len(values):
        raise ValueError("there is nothing to draw from")
    if not 0 < level < 1:
        raise ValueError(f"a level lies between 0 and 1, got {level}")
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))
