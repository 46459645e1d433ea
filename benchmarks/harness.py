"""Interleaved runs and their results: medians with their spread, targets, and whether they are met."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Run = Callable[[], float]

ROUNDS = "10 % … 90 %"
"""The default spread of a result: percentiles over rounds."""
BOOTSTRAP = "95 % interval"
"""The other kind of spread: a bootstrap interval over prompts or questions."""


@dataclass(frozen=True)
class Target:
    """A bound on a value: a lower one, or (`at_least=False`) an upper one."""

    bound: float
    at_least: bool = True

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"

    @classmethod
    def parse(cls, text: str) -> Target:
        """Parse a target as written by `str`, such as `>= 0.98`."""
        sign, _, bound = text.partition(" ")
        if sign not in (">=", "<="):
            raise ValueError(f"a target begins with >= or <=, not {text!r}")
        return cls(float(bound), sign == ">=")


@dataclass(frozen=True)
class Result:
    """One number. `low` and `high` are its spread, of the kind in `Report.spread`."""

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

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        """A result from the output of `to_json`. Raises `ValueError` if `holds` contradicts the value and target."""
        target = None if data["target"] is None else Target.parse(data["target"])
        result = cls(data["case"], data["metric"], data["value"], data["unit"], data["low"], data["high"], target)
        if result.holds is not data["holds"]:
            raise ValueError(
                f"{result.case}, {result.metric}: 'holds' is {data['holds']}, but the value says otherwise"
            )
        return result


@dataclass(frozen=True)
class Report:
    """All results of one benchmark, and how they were measured.

    `date` (ISO 8601), `commands` (as typed in a shell) and `commit` are filled in after a run. A report that was copied
    from an earlier printed table, with its rounding, is `transcribed`. In a `grid`, cases are the rows of the table and
    metrics its columns; otherwise each result has its own row.
    """

    benchmark: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    results: tuple[Result, ...]
    spread: str = ROUNDS
    date: str = ""
    commands: tuple[str, ...] = ()
    commit: str = ""
    transcribed: bool = False
    grid: bool = False

    @property
    def short(self) -> tuple[Result, ...]:
        """The results that miss their target."""
        return tuple(result for result in self.results if result.holds is False)

    def to_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "date": self.date,
            "commands": list(self.commands),
            "commit": self.commit,
            "transcribed": self.transcribed,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "spread": self.spread,
            "grid": self.grid,
            "results": [result.to_json() for result in self.results],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """A report from the output of `to_json`; the fields about how it was measured may be missing.

        Raises:
            KeyError: The benchmark, the machine, the versions, or a field of a result is missing.
            ValueError: A target can't be parsed, or `holds` contradicts it.
        """
        return cls(
            benchmark=data["benchmark"],
            machine=data["machine"],
            versions=data["versions"],
            results=tuple(Result.from_json(result) for result in data["results"]),
            spread=data.get("spread", ROUNDS),
            date=data.get("date", ""),
            commands=tuple(data.get("commands", ())),
            commit=data.get("commit", ""),
            transcribed=data.get("transcribed", False),
            grid=data.get("grid", False),
        )


def interleave(runs: Mapping[str, Run], rounds: int, *, warm_ups: int = 1, case: str = "") -> dict[str, list[float]]:
    """The values that each run returns, by round; the order rotates, and the first `warm_ups` rounds don't count.

    Each value is also printed to stderr immediately, so that a long benchmark that is stopped leaves some results.

    Values of the same round are adjacent in time, so their ratios are hardly affected by a machine that slows down or
    speeds up over minutes.
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
    """The median of the rounds' values, with their 10th and 90th percentiles."""
    if len(values) < 2:
        return Result(case, metric, values[0], unit, values[0], values[0], target)
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Result(case, metric, statistics.median(values), unit, tenths[0], tenths[-1], target)
