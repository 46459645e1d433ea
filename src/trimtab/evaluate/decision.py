"""Whether one arm is better than another, decided by an exact paired test, and said in the same words everywhere.

The test flips signs: if steering did nothing, each item's difference would be as likely the other way round. So its p
is the share of all ways to flip the differences' signs whose sum is at least the one that was seen (Fisher, 1935). For
passes and failures that is the sign test, which is McNemar's exact test on one side. Of steerings that do nothing, at
most a share `LEVEL` is called better, however few the items.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from trimtab.evaluate.intervals import Interval, paired_bootstrap

BETTER, WORSE, LUCK = "better", "worse", "can't be told from luck"
"""The three things that can be said."""
LEVEL = 0.05
"""At most this share of steerings that do nothing is called better, and as many worse."""
ENUMERATED = 16
"""Up to so many items all flips of signs are tried; of more, whole numbers are counted exactly and others drawn."""
DRAWS = 20_000
UNITS = 10_000
"""Differences whose sum in units of the smallest is no more than this are counted exactly."""


@dataclass(frozen=True)
class Decision:
    """One arm against another on the same items.

    Args:
        items: How many there were; items that belong together (one question in two orders) count as one.
        before: The mean score of the arm that is compared with.
        after: That of the arm in question.
        difference: `after - before`, with its 95 % bootstrap interval.
        won: Items with a higher score.
        lost: Items with a lower one.
        p: Of the test that it is better: how often luck alone does as well.
        p_worse: Of the test that it is worse.
        candidates: Of how many this is the best: p counts so many times (Bonferroni).
    """

    items: int
    before: float
    after: float
    difference: Interval
    won: int
    lost: int
    p: float
    p_worse: float
    candidates: int = 1

    @property
    def corrected(self) -> float:
        """p, corrected for the number of candidates."""
        return min(1.0, self.p * self.candidates)

    @property
    def verdict(self) -> str:
        """`"better"`, `"worse"`, or `"can't be told from luck"`."""
        return verdict_of(self.corrected, min(1.0, self.p_worse * self.candidates))

    @property
    def better(self) -> bool:
        """Whether it is better, at the stated rate of error."""
        return self.verdict == BETTER


def verdict_of(p: float, p_worse: float = 1.0) -> str:
    """`BETTER`, `WORSE` or `LUCK`, by the p of both tests, corrected where they are to be."""
    if p <= LEVEL:
        return BETTER
    return WORSE if p_worse <= LEVEL else LUCK


def decide(
    before: Sequence[float],
    after: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    candidates: int = 1,
    seed: int = 0,
) -> Decision:
    """Compare two arms, item by item.

    Args:
        before: The scores of the arm to beat.
        after: Those of the other, in the same order.
        groups: Names of what belongs together, one for each item; its differences change sign together.
        candidates: Of how many `after` is the best on these very items; 1 where the items are fresh.
        seed: Of draws, where there are too many ways to try all, and of the interval.

    Raises:
        ValueError: No items, lists of different length, or a score that isn't a number.
    """
    if not all(math.isfinite(value) for value in (*before, *after)):
        raise ValueError("a score that isn't a number can't be compared")
    interval = paired_bootstrap(before, after, groups=groups, seed=seed)
    sums: dict[Hashable, float] = {}
    for name, b, a in zip(range(len(before)) if groups is None else groups, before, after, strict=True):
        sums[name] = sums.get(name, 0.0) + (a - b)
    differences = [round(difference, 12) for difference in sums.values()]
    return Decision(
        items=len(differences),
        before=mean(before),
        after=mean(after),
        difference=interval,
        won=sum(difference > 0 for difference in differences),
        lost=sum(difference < 0 for difference in differences),
        p=sign_flip(differences, seed),
        p_worse=sign_flip([-difference for difference in differences], seed),
        candidates=candidates,
    )


def sign_flip(differences: Sequence[float], seed: int = 0) -> float:
    """The share of all flips of signs whose sum is at least the one seen: one-sided, exact.

    Where there are too many to try and the differences are no multiples of a common unit, flips are drawn, and the one
    that was seen counts among them, so that p is never too small (Phipson and Smyth, 2010).
    """
    values = np.array([difference for difference in differences if difference != 0], dtype=np.float64)
    if not len(values):
        return 1.0
    seen, slack = values.sum(), 1e-9 * np.abs(values).sum()
    if len(values) <= ENUMERATED:
        totals = np.zeros(1)
        for value in np.abs(values):
            totals = np.concatenate([totals - value, totals + value])
        return float((totals >= seen - slack).mean())
    units = np.abs(values) / np.abs(values).min()
    whole = np.rint(units)
    if np.allclose(units, whole, atol=1e-6) and whole.sum() <= UNITS:
        return _counted(whole.astype(int), round(seen / np.abs(values).min()))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(DRAWS, len(values)))
    hits = int((signs @ np.abs(values) >= seen - slack).sum())
    return (1 + hits) / (1 + DRAWS)


def _counted(sizes: np.ndarray, seen: int) -> float:
    """The chance that a sum of these whole numbers, each with a sign by luck, is at least so large."""
    total = int(sizes.sum())
    chances = np.zeros(2 * total + 1)
    chances[total] = 1.0
    for size in sizes:
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2
    return min(1.0, float(chances[total + seen :].sum()))


def fewest() -> int:
    """So many items, if all are won, can just be told from luck."""
    return math.ceil(-math.log2(LEVEL))


def in_words(decision: Decision, of: str = "prompts") -> str:
    """The verdict as a sentence: what it is, the scores, how many items were won and lost, and how sure that is.

    Args:
        decision: The decision.
        of: What the items are.
    """
    scores = f"{decision.after:.2f} instead of {decision.before:.2f} on {decision.items} {of}"
    counts = f"{decision.won} better, {decision.lost} worse"
    p = decision.corrected if decision.verdict != WORSE else min(1.0, decision.p_worse * decision.candidates)
    chance = f"p = {p:.2g}" + (f" for the best of {decision.candidates}" if decision.candidates > 1 else "")
    return f"{decision.verdict}: {scores} ({counts}; {chance})"


def error_rate() -> str:
    """What the words stand for."""
    return f"of steerings that do nothing, at most {LEVEL:.0%} are called better, and at most {LEVEL:.0%} worse"
