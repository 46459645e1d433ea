"""Decides whether one arm is better than another by an exact paired test, with the same wording everywhere.

The test flips signs: if steering has no effect, each item's difference is as likely to have the opposite sign. So p is
the share of all sign assignments whose sum is at least the observed one (Fisher, 1935). For passes and failures this is
the sign test, that is, McNemar's exact test, one-sided. Of steerings without an effect, at most a share `LEVEL` is
called better, however few the items.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from trimtab.evaluate.intervals import Interval, paired_bootstrap

BETTER, WORSE, LUCK = "better", "worse", "can't be told from luck"
"""The three possible verdicts."""
LEVEL = 0.05
"""At most this share of steerings without an effect is called better, and at most the same share worse."""
ENUMERATED = 16
"""Up to this many items, all sign flips are enumerated. Above it, whole numbers are counted exactly, others sampled."""
DRAWS = 20_000
UNITS = 10_000
"""Differences are counted exactly if their absolute sum, in units of the smallest, is at most this."""


@dataclass(frozen=True)
class Decision:
    """One arm against another on the same items.

    Args:
        items: The number of items; items that belong together (one question in two orders) count as one.
        before: The mean score of the baseline arm.
        after: The mean score of the arm in question.
        difference: `after - before`, with its 95 % bootstrap interval.
        won: The number of items with a higher score.
        lost: The number of items with a lower score.
        p: The p-value of the test that it is better: how often chance alone does as well.
        p_worse: The p-value of the test that it is worse.
        candidates: The number of candidates that this is the best of; p is multiplied by it (Bonferroni).
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
    def corrected_p(self) -> float:
        """p, corrected for the number of candidates."""
        return min(1.0, self.p * self.candidates)

    @property
    def verdict(self) -> str:
        """`"better"`, `"worse"`, or `"can't be told from luck"`."""
        return verdict_of(self.corrected_p, min(1.0, self.p_worse * self.candidates))

    @property
    def better(self) -> bool:
        """Whether it is better, at the stated error rate."""
        return self.verdict == BETTER


def verdict_of(p: float, p_worse: float = 1.0) -> str:
    """`BETTER`, `WORSE` or `LUCK`, from the (corrected) p-values of both tests."""
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
        after: The scores of the other arm, in the same order.
        groups: A group name for each item; the differences of a group change sign together.
        candidates: The number of candidates that `after` is the best of on these same items; 1 if the items are fresh.
        seed: The seed of the sampled sign flips, if there are too many to enumerate, and of the interval.

    Raises:
        ValueError: There are no items, the lists differ in length, or a score isn't finite.
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
    """The share of all sign flips whose sum is at least the observed one: one-sided, exact.

    If there are too many to enumerate and the differences aren't multiples of a common unit, flips are sampled. The
    observed assignment counts as one of them, so that p is never too small (Phipson and Smyth, 2010).
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
    """The probability that the sum of these whole numbers, with random signs, is at least `seen`."""
    total = int(sizes.sum())
    chances = np.zeros(2 * total + 1)
    chances[total] = 1.0
    for size in sizes:
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2
    return min(1.0, float(chances[total + seen :].sum()))


def min_items_for_verdict(candidates: int = 1) -> int:
    """The smallest number of items that, if all are won, gives a verdict other than luck.

    Args:
        candidates: The number of candidates that p is corrected for.
    """
    return math.ceil(math.log2(candidates / LEVEL))


def describe_decision(decision: Decision, of: str = "prompts") -> str:
    """The verdict as a sentence: the verdict, the scores, the numbers of items won and lost, and the p-value.

    Args:
        decision: The decision.
        of: What the items are called.
    """
    scores = f"{decision.after:.2f} instead of {decision.before:.2f} on {decision.items} {of}"
    counts = f"{decision.won} better, {decision.lost} worse"
    p = decision.corrected_p if decision.verdict != WORSE else min(1.0, decision.p_worse * decision.candidates)
    chance = f"p = {p:.2g}" + (f" for the best of {decision.candidates}" if decision.candidates > 1 else "")
    return f"{decision.verdict}: {scores} ({counts}; {chance})"


def error_rate_text() -> str:
    """The error rate behind the verdicts, in words."""
    return f"of steerings that do nothing, at most {LEVEL:.0%} are called better, and at most {LEVEL:.0%} worse"
