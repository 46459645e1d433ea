"""A report as a table: on the terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Report, Result


def show(report: Report, console: Console) -> None:
    """Print the report as a table."""
    table = Table(title=f"{report.benchmark} on {_machine(report)}")
    for number, column in enumerate(_columns(report)):
        table.add_column(column, justify="right" if number in (2, 3) else "left", overflow="fold")
    for result in report.results:
        style = "bold red" if result.holds is False else None
        table.add_row(*_cells(result), style=style)
    console.print(table)


def markdown(report: Report) -> str:
    """The report as it appears in `RESULTS.md`: date, machine, versions, commands, table."""
    commit = f", commit {report.commit}" if report.commit else ""
    transcribed = ", transcribed from the table that was printed then" if report.transcribed else ""
    lines = [
        f"- Date: {report.date}{commit}{transcribed}",
        f"- Machine: {_machine(report)}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in report.versions.items())}",
        *(f"- Command: `{command}`" for command in report.commands),
        *(
            [f"- In brackets: {report.spread}"]
            if report.grid and any(result.low is not None for result in report.results)
            else []
        ),
        "",
        *(_grid(report) if report.grid else _list(report)),
    ]
    return "\n".join(lines) + "\n"


def row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def shortly(report: Report) -> str:
    """The processor and the threads, without the parts that don't distinguish machines."""
    name = report.machine["cpu"].replace("(R)", "").replace(" Processor", "").partition(" @")[0]
    threads = report.machine["threads"]
    return f"{name}, {threads} thread{'s' * (threads != 1)}"


def _list(report: Report) -> Iterator[str]:
    """A row for each result, without empty columns."""
    rows = [_columns(report), *(_cells(result) for result in report.results)]
    kept = [column for column in range(len(rows[0])) if column < 3 or any(cells[column] for cells in rows[1:])]
    yield row([rows[0][column] for column in kept])
    yield row(["---:" if column in (2, 3) else "---" for column in kept])
    for cells in rows[1:]:
        yield row([cells[column] for column in kept])


def _grid(report: Report) -> Iterator[str]:
    """Cases as rows and metrics as columns; a metric `title: column` goes into the table with that title."""
    titles = list(dict.fromkeys(result.metric.rpartition(": ")[0] for result in report.results))
    for number, title in enumerate(titles):
        yield from ([""] if number else [])
        yield from ([f"{title}:", ""] if title else [])
        yield from _part([result for result in report.results if result.metric.rpartition(": ")[0] == title])


def _part(results: Sequence[Result]) -> Iterator[str]:
    """One table of a grid."""
    metrics = list(dict.fromkeys(result.metric for result in results))
    places = {metric: _places([result for result in results if result.metric == metric]) for metric in metrics}
    signed = {result.metric for result in results if result.value < 0 or (result.low is not None and result.low < 0)}
    values = {(result.case, result.metric): result for result in results}
    targets = {result.case: str(result.target) for result in results if result.target is not None}
    yield row(["", *(metric.rpartition(": ")[2] for metric in metrics), *(["target"] if targets else [])])
    yield row(["---", *("---:" for _ in metrics), *(["---"] if targets else [])])
    for case in dict.fromkeys(result.case for result in results):
        cells = [_cell(values.get((case, metric)), places[metric], metric in signed) for metric in metrics]
        yield row([case, *cells, *([targets.get(case, "")] if targets else [])])


def _cell(result: Result | None, places: int, signed: bool) -> str:
    if result is None:
        return ""
    if 0 < abs(result.value) < 1e-3:
        return f"{result.value:.1g}"
    if abs(result.value) >= 10:
        places = _places([result])
    sign = "+" if signed else ""
    missed = " NO" if result.holds is False else ""
    spread = ""
    if result.low is not None and result.high is not None:
        spread = f" [{result.low:{sign}.{places}f}, {result.high:{sign}.{places}f}]"
    return f"{result.value:{sign}.{places}f}{missed}{spread}"


def _places(results: Sequence[Result]) -> int:
    """The decimal places that the values of a column need, three at most."""
    values = [
        value
        for result in results
        for value in (result.value, result.low, result.high)
        if value is not None and (value == 0 or abs(value) >= 1e-3)
    ]
    return next((places for places in range(3) if all(round(value, places) == value for value in values)), 3)


def _machine(report: Report) -> str:
    m = report.machine
    threads = f"{m['threads']} thread{'s' * (m['threads'] != 1)}"
    note = f"; {m['note']}" if m.get("note") else ""
    return f"{m['cpu']}, {m['cores']} cores, {m['ram_gib']} GiB, {threads}, {m['system']}{note}"


def _columns(report: Report) -> tuple[str, ...]:
    return ("case", "metric", "value", report.spread, "target", "holds")


def _cells(result: Result) -> tuple[str, ...]:
    spread = "" if result.low is None or result.high is None else f"{_number(result.low)} … {_number(result.high)}"
    unit = f" {result.unit}" if result.unit not in ("", "ratio") else ""
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
