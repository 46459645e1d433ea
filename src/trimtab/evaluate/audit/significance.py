"""Whether a change is more than chance, for many comparisons at once, and how small a change could have been seen."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import sqrt
from statistics import NormalDist

import numpy as np

from trimtab.evaluate.decision import LEVEL, sign_flip


def p_value(
    before: Sequence[float], after: Sequence[float], groups: Sequence[Hashable] | None = None, seed: int = 0
) -> float:
    """The two-sided p-value of "nothing changed", by flipping signs: for yes and no it is McNemar's exact test.

    Twice that of the one-sided test of `decision`, for the side on which the change is. Items of a group get the same
    sign. `seed` is of draws, where there are too many flips to try all.

    Raises:
        ValueError: Lists of different length, or no items.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(
            f"{len(before)} items before and {len(after)} after: pairs need the same number of both, at least one"
        )
    sums = _sums(before, after, groups)
    return min(1.0, 2 * sign_flip((sums if sums.sum() >= 0 else -sums).tolist(), seed))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: with these, all comparisons together are wrong with the probability of one."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted = [0.0] * len(values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = highest
    return adjusted


def detectable(
    before: Sequence[float], after: Sequence[float], groups: Sequence[Hashable] | None = None, comparisons: int = 1
) -> float | None:
    """How large a change, as a mean, would have been found among so many comparisons.

    For yes and no: the share of items that would have to change, all the same way, or more than 1 where even all would
    not do. Otherwise what would be found with a chance of 0.8, were the differences to scatter as they do; `None` where
    they don't scatter.
    """
    level = LEVEL / comparisons
    if groups is None and {*before, *after} <= {0.0, 1.0}:
        changed = 1
        while 2.0 ** (1 - changed) > level:
            changed += 1
        return changed / len(before)
    sums = _sums(before, after, groups)
    if len(sums) < 2 or not (spread := float(sums.std(ddof=1))):
        return None
    normal = NormalDist()
    return (normal.inv_cdf(1 - level / 2) + normal.inv_cdf(0.8)) * spread * sqrt(len(sums)) / len(before)


def _sums(before: Sequence[float], after: Sequence[float], groups: Sequence[Hashable] | None) -> np.ndarray:
    """The sum of the differences of each group, or of each item by itself."""
    values = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if groups is None:
        return values
    numbers: dict[Hashable, int] = {}
    return np.bincount([numbers.setdefault(group, len(numbers)) for group in groups], values)
