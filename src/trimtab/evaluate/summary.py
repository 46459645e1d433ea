"""Summarizes an evaluation: means with intervals per arm, and how each arm differs from the baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.evaluate.intervals import RESAMPLES, Interval, mcnemar, paired_bootstrap
from trimtab.evaluate.records import Record


@dataclass(frozen=True)
class Difference:
    """An arm against the baseline on the same items.

    `mean` is the mean of `arm - baseline`. `better` and `worse` count the items that changed. `p` is McNemar's exact
    p-value (which assumes independent items) if all scores are 1 or 0, else `None`.
    """

    mean: Interval
    better: int
    worse: int
    p: float | None


@dataclass(frozen=True)
class Line:
    """One score of one arm, over the `n` items of one `key` (`None`: all), and the difference from the baseline."""

    arm: str
    score: str
    key: str | None
    n: int
    mean: Interval
    difference: Difference | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(
    records: Sequence[Record],
    scores: Sequence[str],
    *,
    baseline: str | None = None,
    key: Callable[[Record], str] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Line]:
    """The lines of every arm and score, with the baseline's arm first and the others by name.

    `key` splits the items (by type of instruction, say) and gives a line for each part. If records name groups, the
    intervals resample whole groups.

    Raises `TrimtabError` if there are no records, a score or the baseline is missing, a score is NaN, an item occurs
    twice in an arm, or the arms have different items.
    """
    if not records:
        raise TrimtabError("there are no records to summarize")
    arms: dict[str, dict[str, Record]] = {}
    for record in records:
        items = arms.setdefault(record.arm, {})
        if record.item in items:
            raise TrimtabError(f"item {record.item!r} occurs twice in arm {record.arm!r}")
        items[record.item] = record
    if baseline is not None and baseline not in arms:
        raise TrimtabError(f"there is no arm {baseline!r} to compare with; there are {', '.join(sorted(arms))}")
    names = sorted(arms, key=lambda name: (name != baseline, name))
    for name in names if baseline is not None else ():
        assert baseline is not None
        if odd := sorted(set(arms[name]) ^ set(arms[baseline])):
            raise TrimtabError(f"item {odd[0]!r} is in only one of the arms {name!r} and {baseline!r}: not comparable")
    lines = []
    for part in sorted({key(record) for record in records}) if key else [None]:
        for name in names:
            mine = {i: r for i, r in sorted(arms[name].items()) if key is None or key(r) == part}
            if not mine:
                continue
            groups = None
            if any(record.group is not None for record in mine.values()):
                groups = [record.item if record.group is None else record.group for record in mine.values()]
            for score in scores:
                values = [_value(record, score) for record in mine.values()]
                options: dict[str, Any] = {"groups": groups, "level": level, "resamples": resamples, "seed": seed}
                difference = None
                if baseline is not None and name != baseline:
                    before = [_value(arms[baseline][item], score) for item in mine]
                    difference = _difference(before, values, options)
                lines.append(Line(name, score, part, len(mine), paired_bootstrap(values, **options), difference))
    return lines


def _difference(before: list[float], after: list[float], options: dict[str, Any]) -> Difference:
    return Difference(
        mean=paired_bootstrap(before, after, **options),
        better=sum(a > b for b, a in zip(before, after, strict=True)),
        worse=sum(a < b for b, a in zip(before, after, strict=True)),
        p=mcnemar(before, after) if {*before, *after} <= {0.0, 1.0} else None,
    )


def _value(record: Record, score: str) -> float:
    if score not in record.scores:
        raise TrimtabError(f"arm {record.arm!r}, item {record.item!r} has no score {score!r}")
    value = record.scores[score]
    if math.isnan(value):
        raise TrimtabError(f"arm {record.arm!r}, item {record.item!r}: the score {score!r} isn't a number")
    return float(value)
