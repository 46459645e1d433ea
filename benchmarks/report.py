"""A report as a table: on the terminal, and in Markdown."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Report, Result

COLUMNS = ("case", "metric", "median", "10 % … 90 %", "target", "holds")


def show(report: Report, console: Console) -> None:
    """Print the report as a table."""
    table = Table(title=f"{report.benchmark} on {_machine(report)}")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in COLUMNS[2:4] else "left", overflow="fold")
    for result in report.results:
        style = "bold red" if result.holds is False else None
        table.add_row(*_cells(result), style=style)
    console.print(table)


def markdown(report: Report, arguments: Sequence[str], date: datetime.date | None = None) -> str:
    """The report as it goes into `RESULTS.md`: date, machine, versions, command, table."""
    date = date or datetime.date.today()
    rows = [COLUMNS, ("---", "---", "---:", "---:", "---", "---"), *(_cells(result) for result in report.results)]
    lines = [
        f"### `{report.benchmark}`, {date.isoformat()}",
        "",
        f"- Machine: {_machine(report)}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in report.versions.items())}",
        f"- Command: `python -m benchmarks {shlex.join(arguments)}`",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _machine(report: Report) -> str:
    m = report.machine
    threads = f"{m['threads']} thread{'s' * (m['threads'] != 1)}"
    return f"{m['cpu']}, {m['cores']} cores, {m['ram_gib']} GiB, {threads}, {m['system']}"


def _cells(result: Result) -> tuple[str, ...]:
    spread = "" if result.low is None or result.high is None else f"{_number(result.low)} … {_number(result.high)}"
    unit = "" if result.unit == "ratio" else f" {result.unit}"
    return (
        result.case,
        result.metric,
        f"{_number(result.value)}{unit}",
        spread,
        "" if result.target is None else str(result.target),
        {None: "", True: "yes", False: "NO"}[result.holds],
    )


def _number(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.5g}"
