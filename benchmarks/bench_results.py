"""The results of `trimtab bench` as a report, so that RESULTS.md shows them as it does those of the benchmarks here.

`results.json` of a run says nothing about when, where and how it was run. A copy in `benchmarks/results/bench/` has
that in addition, as `run`: the date, the commands and the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.harness import BOOTSTRAP, Report, Result

KEYS = {"about", "tasks", "methods", "verdict"}
PREFIX = "bench-"
"""A run's table in RESULTS.md is called by the file's name with this before it."""


def is_bench(document: Any) -> bool:
    """Whether a JSON document is `results.json` of `trimtab bench`."""
    return isinstance(document, dict) and document.keys() >= KEYS


def bench_report(document: Mapping[str, Any]) -> Report:
    """A table for each task: each method at its best strength, in the order of its gains, and the arms without one.

    Raises:
        KeyError: The document has no `run`, or lacks a part.
    """
    run, about = document["run"], document["about"]
    return Report(
        benchmark="trimtab bench",
        machine=run["machine"],
        versions={**about["versions"], "model": about["model"]["name"]},
        results=tuple(result for task in document["tasks"] for result in _task(task)),
        spread=BOOTSTRAP,
        date=run["date"],
        commands=tuple(run["commands"]),
        grid=True,
    )


def _task(task: Mapping[str, Any]) -> Iterator[Result]:
    title = f"{task['task']} ({task['items']} items, {task['unit']})"
    yield Result("unsteered", f"{title}: score", task["unsteered"], "")
    for arm, decision in task["told"].items():
        yield from _arm(title, arm, decision)
    best = {row["method"]: _best(row) for row in task["rows"]}
    for method in sorted(best, key=lambda name: (-best[name]["decision"]["difference"]["estimate"], name)):
        cell = best[method]
        yield from _arm(title, method, cell["decision"])
        for name, column in {"random": "p, random", "orthogonal": "p, orthogonal", "span": "p, random span"}.items():
            if cell.get(name) is not None:
                yield Result(method, f"{title}: {column}", cell[name], "")
        if cell["nats"] is not None:
            yield Result(method, f"{title}: nats", cell["nats"], "")


def _arm(title: str, arm: str, decision: Mapping[str, Any]) -> Iterator[Result]:
    gain = decision["difference"]
    yield Result(arm, f"{title}: score", decision["after"], "")
    yield Result(arm, f"{title}: minus unsteered", gain["estimate"], "", gain["low"], gain["high"])
    yield Result(arm, f"{title}: p", min(1.0, decision["p"] * decision["candidates"]), "")


def _best(row: Mapping[str, Any]) -> Mapping[str, Any]:
    best: Mapping[str, Any] = next(cell for cell in row["cells"] if cell["nats"] == row["at_nats"])
    return best
