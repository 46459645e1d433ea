"""Compares each measure with the unsteered model, and describes the result in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.evaluate.audit.checks import UNSTEERED, Measure
from trimtab.evaluate.audit.significance import detectable, holm, p_value
from trimtab.evaluate.decision import LEVEL
from trimtab.evaluate.intervals import Interval, paired_bootstrap


@dataclass(frozen=True)
class Comparison:
    """One measure of an arm against the unsteered model.

    Args:
        check: The check of the measure.
        name: The name of the measure.
        unit: The unit of the measure.
        items: The number of items, each of which is a pair of an unsteered and a steered value.
        before: The unsteered mean; for counts, the number of items.
        after: The steered mean; for counts, the number of items.
        change: The paired mean difference with its 95 % interval.
        p: The p-value of this comparison by itself.
        adjusted: The p-value adjusted for all comparisons of the arm (Holm).
        kind: "harm" or "change" if the change is significant at 5 % among all comparisons, "harm" if it is for the
            worse; "hint" if it is significant only by itself; else "nothing".
        could: The smallest change of the mean that would have been detected; `None` if that isn't known.
        room: For counts, the number of items that could get worse.
        words: The comparison as a sentence.
    """

    check: str
    name: str
    unit: str
    items: int
    before: float
    after: float
    change: Interval
    p: float
    adjusted: float
    kind: str
    could: float | None
    room: int | None
    words: str

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain, rounded values, as stored in a card."""
        numbers = {"before": self.before, "after": self.after, "p": self.p, "adjusted": self.adjusted}
        return {
            "check": self.check,
            "name": self.name,
            "unit": self.unit,
            "items": self.items,
            **{name: round(value, 6) for name, value in numbers.items()},
            "change": [round(value, 6) for value in (self.change.estimate, self.change.low, self.change.high)],
            "kind": self.kind,
            "could": None if self.could is None else round(self.could, 6),
            "room": self.room,
            "words": self.words,
        }


def compare(measures: Sequence[Measure], arm: str, seed: int = 0) -> list[Comparison]:
    """Compare every measure of an arm with the unsteered model."""
    pairs = [(each, each.values[UNSTEERED], each.values[arm]) for each in measures]
    chances = [p_value(before, after, each.groups, seed) for each, before, after in pairs]
    comparisons = []
    for (measure, before, after), p, adjusted in zip(pairs, chances, holm(chances), strict=True):
        change = paired_bootstrap(before, after, groups=measure.groups, seed=seed)
        could = detectable(before, after, measure.groups, len(measures))
        worse = change.estimate * measure.worse > 0
        kind = "nothing"
        if adjusted <= LEVEL:
            kind = "harm" if worse else "change"
        elif p <= LEVEL:
            kind = "hint"
        count = measure.unit == "count"
        first, last = (sum(values) / (1 if count else len(values)) for values in (before, after))
        worst = float(measure.worse > 0)
        room = sum(value != worst for value in before) if count and measure.worse else None
        words = _words(measure, (first, last), change, p, kind)
        comparisons.append(
            Comparison(
                measure.check,
                measure.name,
                measure.unit,
                len(before),
                first,
                last,
                change,
                p,
                adjusted,
                kind,
                could,
                room,
                words,
            )
        )
    return comparisons


def verdict(comparisons: Sequence[Comparison]) -> list[str]:
    """One line per finding, worst first; the last line lists where nothing was found, and what would have shown."""
    lines = [
        comparison.words for kind in ("harm", "change", "hint") for comparison in comparisons if comparison.kind == kind
    ]
    silent = [comparison for comparison in comparisons if comparison.kind == "nothing"]
    if not lines:
        lines.append(f"no side effect found in {len(comparisons)} comparisons")
    if silent:
        looked = "; ".join(f"{comparison.name} ({_could(comparison)})" for comparison in silent)
        lines.append(f"nothing found in {len(silent)} of {len(comparisons)} comparisons: {looked}")
    return lines


def _words(measure: Measure, means: tuple[float, float], change: Interval, p: float, kind: str) -> str:
    """A comparison as a sentence without a subject."""
    n = len(measure.values[UNSTEERED])
    if measure.unit == "count":
        numbers = f"from {means[0]:.0f} to {means[1]:.0f} of {n}"
    elif measure.unit == "nats":
        numbers = f"by {abs(change.estimate):.2g} nats per token [{change.low:+.2g}, {change.high:+.2g}]"
        if measure.check != "refusal":
            numbers = f"by a factor of {_factor(change.estimate)} [{_factor(change.low)}, {_factor(change.high)}]"
    else:
        numbers = f"from {means[0]:.2f} to {means[1]:.2f} [{change.low:+.2f}, {change.high:+.2f}]"
    sure = f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"
    if kind == "nothing":
        return f"{measure.name}: nothing found, {numbers} ({sure})"
    sentence = f"{measure.change_phrases[0 if change.estimate > 0 else 1]} {numbers} ({sure})"
    return sentence if kind != "hint" else f"perhaps {sentence}, not beyond chance among all comparisons"


def _factor(nats: float) -> str:
    return f"{math.exp(min(nats, 700.0)):.2f}"


def _could(comparison: Comparison) -> str:
    if comparison.could is None:
        return "no item changed"
    if comparison.unit == "count":
        changed = round(comparison.could * comparison.items)
        if comparison.room is not None and comparison.room < changed:
            return f"only {comparison.room} of {comparison.items} could get worse, too few to tell"
        return f"{changed} of {comparison.items} would have shown"
    if comparison.unit == "nats" and comparison.check != "refusal":
        return f"a factor of {math.exp(comparison.could):.2f} would have shown"
    return f"{comparison.could:.2g} would have shown"
