"""`RESULTS.md` from the JSON reports in `benchmarks/results/`: their tables, and the summary at the top.

A table is between `<!-- NAME: begin, text of DATE -->` and `<!-- NAME: end -->`, where NAME is the file's. DATE is the
date of the run that the surrounding text was written for. If the table is from a later run, a note above it says so,
until somebody has checked the text and changed the date.

Results of `trimtab bench` are in `benchmarks/results/bench/`; their tables are called `bench-NAME`.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.bench_results import PREFIX, bench_report, is_bench
from benchmarks.harness import Report
from benchmarks.report import markdown, row, shortly

HERE = Path(__file__).parent
PAGE = HERE / "RESULTS.md"
REPORTS = HERE / "results"
SUMMARY = "summary"
PROGRAM = "python -m benchmarks"
SECTIONS = "## Results\n"
BLOCK = re.compile(
    r"<!-- (?P<name>[\w.-]+): begin(?:, text of (?P<date>[\d-]+))? -->\n(?P<body>.*?)<!-- (?P=name): end -->", re.DOTALL
)
MISSES = 2
"""The number of missed targets per report that the summary lists."""


def results(
    add: Annotated[
        list[Path] | None,
        typer.Option(
            "--add",
            help="Add this report, written by --json, or results.json of trimtab bench, if it ran on this machine;"
            " repeatable.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="With --add: its name; default: the name of its benchmark.")] = None,
    date: Annotated[str | None, typer.Option(help="With --add: the date of the run, if the report has none.")] = None,
    command: Annotated[
        list[str] | None, typer.Option(help="With --add: the command of the run, if the report has none; repeatable.")
    ] = None,
    note: Annotated[str | None, typer.Option(help="With --add: what else ran on the machine.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with status 1 if RESULTS.md is out of date.")
    ] = False,
) -> None:
    """Write the tables of RESULTS.md from the reports in benchmarks/results, and take new ones."""
    if add and (check or (name is not None and len(add) > 1)):
        raise typer.BadParameter(
            "--check can't be used with --add, and --name only with one report", param_hint="--add"
        )
    before = PAGE.read_text(encoding="utf-8")
    page = before
    try:
        for file in add or ():
            if is_bench(document := parsed(file)):
                page = with_bench(page, document, file, name, date, command or [], note)
                continue
            report = dated(read(file), file, date, command or [], note)
            called = name or report.benchmark
            (REPORTS / f"{called}.json").write_text(written(report), encoding="utf-8")
            page = with_section(page, called, report)
        page = rendered(page, stored())
    except ValueError as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        raise typer.Exit(1) from wrong
    if check:
        changes = list(difflib.unified_diff(before.splitlines(), page.splitlines(), "RESULTS.md", "the reports", n=0))
        if changes:
            print("\n".join(changes[:40]), file=sys.stderr)
            print("RESULTS.md doesn't match the reports: run python -m benchmarks results", file=sys.stderr)
            raise typer.Exit(1)
        return
    PAGE.write_text(page, encoding="utf-8")
    for stale in (match["name"] for match in BLOCK.finditer(page) if "*The text of this section" in match["body"]):
        print(f"{stale}: read the section's text again, then change the date in its begin marker")


def read(file: Path) -> Report:
    """A report from a file; any error is a `ValueError` that names the file."""
    document = parsed(file)
    try:
        return bench_report(document) if is_bench(document) else Report.from_json(document)
    except KeyError as wrong:
        raise ValueError(f"{file} has no {wrong}; write it with --json of a benchmark") from wrong
    except (TypeError, AttributeError, ValueError) as wrong:
        raise ValueError(f"{file} isn't the report of a benchmark: {wrong}") from wrong


def parsed(file: Path) -> Any:
    """The JSON document in a file; any error is a `ValueError` that names the file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as wrong:
        raise ValueError(f"{file} can't be read: {wrong.strerror}") from wrong
    except ValueError as wrong:
        raise ValueError(f"{file} isn't the report of a benchmark: {wrong}") from wrong


def stored() -> dict[str, Report]:
    """All reports by the names of their tables."""
    reports = {file.stem: read(file) for file in sorted(REPORTS.glob("*.json"))}
    return reports | {f"{PREFIX}{file.stem}": read(file) for file in sorted((REPORTS / "bench").glob("*.json"))}


def with_bench(
    page: str,
    document: dict[str, Any],
    file: Path,
    name: str | None,
    date: str | None,
    commands: list[str],
    note: str | None,
) -> str:
    """Store a run of `trimtab bench` with its date and commands, and make a place for its table.

    Raises `ValueError` without a name, a date or commands.
    """
    if not (name and date and commands):
        raise ValueError(
            f"{file} is the result of trimtab bench and doesn't say when or how it was run: give --name default-model,"
            " --date 2026-12-31 and --command '…'"
        )
    from benchmarks.machine import machine  # it imports torch, which the check of the page doesn't need

    here = {**machine(), "note": note} if note else machine()
    document = {**document, "run": {"date": date, "commands": commands, "machine": here}}
    target = REPORTS / "bench" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return with_section(page, f"{PREFIX}{name}", bench_report(document))


def written(report: Report) -> str:
    """The report as its file: one result per line, so that a changed number is a changed line."""
    data = report.to_json()
    lines = ",\n".join(f"    {json.dumps(result, ensure_ascii=False)}" for result in data.pop("results"))
    head = json.dumps(data, ensure_ascii=False, indent=2).removesuffix("\n}")
    return f'{head},\n  "results": [\n{lines}\n  ]\n}}\n'


def dated(report: Report, file: Path, date: str | None, commands: list[str], note: str | None) -> Report:
    """The report with its date, commands and note. Raises `ValueError` if it has no date or commands."""
    machine = {**report.machine, "note": note} if note else report.machine
    report = replace(
        report, date=report.date or date or "", commands=report.commands or tuple(commands), machine=machine
    )
    if not report.date or not report.commands:
        raise ValueError(f"{file} doesn't say when or how it was measured: give --date 2026-12-31 and --command '…'")
    return report


def with_section(page: str, name: str, report: Report) -> str:
    """The page with a place for this report: a section at the top of the results, unless there is one."""
    if any(match["name"] == name for match in BLOCK.finditer(page)):
        return page
    section = f"\n### `{name}`\n\n<!-- {name}: begin, text of {report.date} -->\n<!-- {name}: end -->\n"
    if SECTIONS not in page:
        raise ValueError(f"RESULTS.md has no line {SECTIONS.strip()!r} to put the section of {name} after")
    return page.replace(SECTIONS, SECTIONS + section, 1)


def rendered(page: str, reports: Mapping[str, Report]) -> str:
    """The page with every table written from its report.

    Raises:
        ValueError: A report has no place on the page, or a place has no report.
    """
    places = [match["name"] for match in BLOCK.finditer(page)]
    if twice := sorted({name for name in places if places.count(name) > 1}):
        raise ValueError(f"RESULTS.md has two places for {', '.join(twice)}: remove one")
    if homeless := sorted({*reports, SUMMARY} - set(places)):
        raise ValueError(f"RESULTS.md has no place for {homeless[0]}: add <!-- {homeless[0]}: begin --> and its end")
    if empty := sorted(set(places) - {*reports, SUMMARY}):
        raise ValueError(f"there is no benchmarks/results/{empty[0]}.json for the table {empty[0]} of RESULTS.md")

    def block(match: re.Match[str]) -> str:
        name, date = match["name"], match["date"]
        begin = match[0].partition("\n")[0]
        if name == SUMMARY:
            body = summary({place: reports[place] for place in places if place != SUMMARY}, sections(page))
        else:
            stale = f"*The text of this section was written for the run of {date}.*\n\n"
            body = (stale if date and reports[name].date > date else "") + markdown(reports[name])
        return f"{begin}\n\n{body}\n<!-- {name}: end -->"  # a blank line, so that Markdown sees a list or a table

    return BLOCK.sub(block, page)


def sections(page: str) -> dict[str, str]:
    """The anchor of the section that each table is in."""
    anchors = {}
    for match in BLOCK.finditer(page):
        heading = page[: match.start()].rpartition("\n### ")[2].partition("\n")[0]
        anchors[match["name"]] = re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")
    return anchors


def summary(reports: Mapping[str, Report], anchors: Mapping[str, str]) -> str:
    """One row for each report: when, where and how it was measured, and which targets it misses."""
    lines = [row(("table", "date", "machine", "targets", f"`{PROGRAM}` …")), row(("---",) * 5)]
    for name, report in reports.items():
        more = f" and {len(report.commands) - 1} more" * (len(report.commands) > 1)
        command = f"`{report.commands[0].removeprefix(PROGRAM).strip()}`{more}"
        lines.append(row((f"[{name}](#{anchors[name]})", report.date, shortly(report), _targets(report), command)))
    return "\n".join(lines) + "\n"


def _targets(report: Report) -> str:
    aimed = sum(result.target is not None for result in report.results)
    if not aimed:
        return "none set"
    if not report.short:
        return f"{aimed} of {aimed} hold"
    named = "; ".join(
        f"{result.case}: {result.metric} {result.value:.4g}, not {result.target}" for result in report.short[:MISSES]
    )
    more = f"; and {len(report.short) - MISSES} more" * (len(report.short) > MISSES)
    return f"{aimed - len(report.short)} of {aimed} hold; misses {named}{more}"
