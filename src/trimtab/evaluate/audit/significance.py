"""Whether a change is more than chance, for many comparisons at once, and how small a change could have been seen."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import product
from math import sqrt
from statistics import NormalDist

import numpy as np

from trimtab.evaluate.intervals import mcnemar

LEVEL = 0.05
DRAWS = 9_999
ALL = 12
"""With so few independent items all flips of signs are tried."""


def p_value(
    before: Sequence[float], after: Sequence[float], groups: Sequence[Hashable] | None = None, seed: int = 0
) -> float:
    """The two-sided p-value of "nothing changed": McNemar's exact one for yes and no, else by flipping signs.

    Each item's difference would be as likely to be the other way round if nothing had changed, so the mean is compared
    with those under random signs (Fisher's randomisation test; exact up to 12 items, else of 9,999 draws). Items of a
    group get the same sign.

    Raises:
        ValueError: Lists of different length, or no items.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(f"{len(before)} items before and {len(after)} after: pairs need as many of both, and some")
    if groups is None and {*before, *after} <= {0.0, 1.0}:
        return mcnemar(before, after)
    sums = _sums(before, after, groups)
    seen = abs(sums.sum())
    if not sums.any():
        return 1.0
    close = seen * (1 - 1e-9)
    if len(sums) <= ALL:
        signs = np.array(list(product((-1.0, 1.0), repeat=len(sums))))
        return float((abs(signs @ sums) >= close).mean())
    draws = np.random.default_rng(seed).choice((-1.0, 1.0), size=(DRAWS, len(sums)))
    return float((1 + (abs(draws @ sums) >= close).sum()) / (1 + DRAWS))


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
