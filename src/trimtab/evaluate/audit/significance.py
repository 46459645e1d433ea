"""Tests changes for significance, corrects for many comparisons, and computes the smallest detectable change."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import sqrt
from statistics import NormalDist

import numpy as np

from trimtab.evaluate.decision import LEVEL, sign_flip


def p_value(
    before: Sequence[float], after: Sequence[float], groups: Sequence[Hashable] | None = None, seed: int = 0
) -> float:
    """The two-sided p-value of "nothing changed", by flipping signs; for values of 1 and 0 it is McNemar's exact test.

    It is twice the one-sided p-value of `decision`, in the direction of the change.

    Args:
        before: The values of the unsteered arm.
        after: The values of the other arm, in the same order.
        groups: The group of each item; the differences of a group change sign together.
        seed: The seed of sampled sign flips, if there are too many to enumerate.

    Raises:
        ValueError: The lists differ in length, or there are no items.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(
            f"{len(before)} items before and {len(after)} after: pairs need the same number of both, at least one"
        )
    sums = _sums(before, after, groups)
    return min(1.0, 2 * sign_flip((sums if sums.sum() >= 0 else -sums).tolist(), seed))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: the probability of any false finding among all comparisons is at most the level."""
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
    """The smallest change of the mean that would be significant.

    For values of 1 and 0, it is the share of items that would have to change in the same direction; it is above 1 if
    even all of them aren't enough. Otherwise it is the change that would be found with a power of 0.8, given the
    observed standard deviation of the differences; `None` if they are all equal.

    Args:
        before: The values of the unsteered arm.
        after: The values of the other arm, in the same order.
        groups: The group of each item; items of a group aren't independent.
        comparisons: The number of comparisons to correct for.
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
