"""Interleaved runs, and what they say: medians with their spread, targets, and which of them hold."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Run = Callable[[], float]


@dataclass(frozen=True)
class Target:
    """A bound on a value: from below, or (`at_least=False`) from above."""

    bound: float
    at_least: bool = True

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


@dataclass(frozen=True)
class Result:
    """One number. `low` and `high` are the 10th and 90th percentile over rounds, where there were any."""

    case: str
    metric: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    target: Target | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the target is met; `None` without one."""
        return None if self.target is None else self.target.met(self.value)

    def to_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "metric": self.metric,
            "value": self.value,
            "unit": self.unit,
            "low": self.low,
            "high": self.high,
            "target": None if self.target is None else str(self.target),
            "holds": self.holds,
        }


@dataclass(frozen=True)
class Report:
    """All results of one benchmark, and on what they were measured."""

    benchmark: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    results: tuple[Result, ...]

    @property
    def short(self) -> tuple[Result, ...]:
        """The results that miss their target."""
        return tuple(result for result in self.results if result.holds is False)

    def to_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "results": [result.to_json() for result in self.results],
        }


def interleave(runs: Mapping[str, Run], rounds: int, *, warm_ups: int = 1, case: str = "") -> dict[str, list[float]]:
    """What each run returns, round by round; the order rotates, and the first `warm_ups` rounds don't count.

    Each value is also printed as it comes, to stderr: a long benchmark that is stopped has then said something.

    Values of the same round are neighbours in time, so their ratios are little disturbed by a machine that
    slows down or speeds up over minutes.
    """
    names = list(runs)
    values: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_ups, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            value = runs[name]()
            label = f"round {number + 1} of {rounds}" if number >= 0 else "warm-up"
            print(f"{case}{', ' if case else ''}{label}: {name} {value:.4g}", file=sys.stderr, flush=True)
            if number >= 0:
                values[name].append(value)
    return values


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The ratios of values of the same round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def summarized(case: str, metric: str, unit: str, values: Sequence[float], target: Target | None = None) -> Result:
    """The median of the rounds' values, with their 10th and 90th percentile."""
    if len(values) < 2:
        return Result(case, metric, values[0], unit, values[0], values[0], target)
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Result(case, metric, statistics.median(values), unit, tenths[0], tenths[-1], target)
