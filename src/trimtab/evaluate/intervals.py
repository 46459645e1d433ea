"""The uncertainty of a difference: the paired bootstrap, and McNemar's exact test."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval, in the unit of the data."""

    estimate: float
    low: float
    high: float


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float] | None = None,
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap interval of a mean, or of the mean of `after - before`.

    Item i of both lists is the same prompt, so pairs are resampled, and differences in difficulty between prompts
    cancel out. Passes and failures as 1 and 0 give the difference of two proportions. The same seed gives the same
    interval. If all differences are equal, the interval has zero width: the bootstrap can't account for what it never
    draws.

    With `groups`, one name for each item, whole groups are resampled, and the mean is over the items of the sampled
    groups. Use it for items that aren't independent, such as several instructions in one prompt. With as few as ten
    groups, the interval is too narrow.

    Raises `ValueError` if there are no items, the lists differ in length, or the level is outside 0 … 1.
    """
    values = np.asarray(before, dtype=np.float64)
    if after is not None:
        if len(after) != len(before):
            raise ValueError(f"{len(before)} items before and {len(after)} after: pairs need the same number of both")
        values = np.asarray(after, dtype=np.float64) - values
    if not len(values):
        raise ValueError("there are no items to resample")
    if not 0 < level < 1:
        raise ValueError(f"a level lies between 0 and 1, got {level}")
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} items: each item needs one")
    numbers: dict[Hashable, int] = {}
    member = [numbers.setdefault(group, len(numbers)) for group in (range(len(values)) if groups is None else groups)]
    sums, sizes = np.bincount(member, values), np.bincount(member)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def mcnemar(before: Sequence[float], after: Sequence[float]) -> float:
    """McNemar's exact p-value, two-sided: of the items that changed, did as many get better as worse?

    Both lists hold 1 and 0, and item i of both is the same prompt; items are assumed to be independent. 1 if none
    changed.

    Raises `ValueError` for lists of different lengths, or values other than 1 and 0.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} items before and {len(after)} after: pairs need the same number of both")
    if not {*before, *after} <= {0, 1}:
        raise ValueError("McNemar's test needs values of 1 (pass) or 0 (fail)")
    better = sum(b < a for b, a in zip(before, after, strict=True))
    worse = sum(b > a for b, a in zip(before, after, strict=True))
    changed = better + worse
    tail = sum(comb(changed, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**changed)
