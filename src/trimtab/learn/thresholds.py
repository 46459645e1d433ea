"""Thresholds of gates: the ROC curve on data, and the choice of a point on it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from trimtab.errors import TrimtabError

Choice = Literal["youden", "f1", "midpoint"]
"""How the threshold is chosen: the largest `hits - false alarms` (`youden`), the largest F1 (`f1`, as in CAST), or the
midpoint between the two sides' mean scores (`midpoint`, as in InferAligner)."""
CHOICES = ("youden", "f1", "midpoint")
CARD_POINTS = 64
"""The maximum number of points of a curve in a card."""


@dataclass(frozen=True)
class Point:
    """A threshold, and the shares of scores above it: `hits` among the positives, `false_alarms` among the others."""

    threshold: float
    hits: float
    false_alarms: float


@dataclass(frozen=True)
class Curve:
    """The receiver operating characteristic: a point between each two neighboring scores, from all open to none.

    `area` is the probability that a score of the meant side exceeds one of the other side (ties count one half).
    """

    points: tuple[Point, ...]
    area: float
    counts: tuple[int, int]

    def best_point(self, by: Choice = "youden", false_alarms: float | None = None) -> Point:
        """The best point by this measure, among those with at most this share of false alarms.

        Among equally good points, the one in the widest gap between neighboring scores wins. Raises `TrimtabError` for
        an unknown measure.
        """
        if by not in ("youden", "f1"):
            raise TrimtabError(f"unknown choice of a threshold {by!r}; known: {', '.join(CHOICES)}")
        allowed = [p for p in self.points if false_alarms is None or p.false_alarms <= false_alarms]
        return max(allowed, key=lambda p: (round(self._choice_score(p, by), 12), self._gap(p)))

    def _choice_score(self, point: Point, by: str) -> float:
        if by == "youden":
            return point.hits - point.false_alarms
        hits, alarms = point.hits * self.counts[0], point.false_alarms * self.counts[1]
        return 2 * hits / (hits + alarms + self.counts[0])

    def _gap(self, point: Point) -> float:
        i = self.points.index(point)
        inner = 0 < i < len(self.points) - 1
        return self.points[i + 1].threshold - self.points[i - 1].threshold if inner else 0.0

    def for_card(self, chosen_point: Point) -> dict[str, Any]:
        """The curve, its area and the chosen point as JSON values. Only corners are kept, at most `CARD_POINTS`."""
        corners = [
            p
            for i, p in enumerate(self.points)
            if not 0 < i < len(self.points) - 1 or not _straight(*self.points[i - 1 : i + 2])
        ]
        step = max(1, -(-len(corners) // CARD_POINTS))
        kept = [p for i, p in enumerate(corners) if i % step == 0 or i == len(corners) - 1]
        return {
            "area": round(self.area, 6),
            "meant": self.counts[0],
            "others": self.counts[1],
            "chosen": _point_entries(chosen_point),
            "curve": [_point_entries(p) for p in kept],
        }


def roc(meant: Sequence[float], others: Sequence[float]) -> Curve:
    """The curve for scores at which a gate should be open (`meant`) and closed (`others`).

    Raises `TrimtabError` if a side has no scores.
    """
    if not meant or not others:
        raise TrimtabError("a threshold is learned from both sides: prompts that should open the gate, and others")
    values = sorted({*meant, *others})
    lines = [values[0] - 1.0, *((a + b) / 2 for a, b in pairwise(values)), values[-1] + 1.0]
    high, low = sorted(meant), sorted(others)
    points = [_point(high, low, line) for line in lines]
    area = sum((a.false_alarms - b.false_alarms) * (a.hits + b.hits) / 2 for a, b in pairwise(points))
    return Curve(tuple(points), area, (len(meant), len(others)))


def learn_threshold(
    meant: Sequence[float], others: Sequence[float], by: Choice = "youden", false_alarms: float | None = None
) -> tuple[Point, Curve]:
    """The chosen point, with the gate's threshold, and the curve.

    Raises `TrimtabError` for a side without scores or an unknown choice.
    """
    curve = roc(meant, others)
    if by != "midpoint":
        return curve.best_point(by, false_alarms), curve
    return _point(sorted(meant), sorted(others), (sum(meant) / len(meant) + sum(others) / len(others)) / 2), curve


def _point(high: Sequence[float], low: Sequence[float], line: float) -> Point:
    return Point(line, _count_above(high, line) / len(high), _count_above(low, line) / len(low))


def _count_above(ordered: Sequence[float], line: float) -> int:
    return len(ordered) - bisect_right(ordered, line)


def _straight(a: Point, b: Point, c: Point) -> bool:
    """Whether a, b and c are on a horizontal or vertical line."""
    return a.hits == b.hits == c.hits or a.false_alarms == b.false_alarms == c.false_alarms


def _point_entries(point: Point) -> dict[str, float]:
    return {
        "threshold": float(f"{point.threshold:.9g}"),
        "hits": round(point.hits, 6),
        "false_alarms": round(point.false_alarms, 6),
    }
