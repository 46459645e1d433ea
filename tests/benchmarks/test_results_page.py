"""RESULTS.md from its reports: tables that hold every figure, places that must match, and texts that are older."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import results as page  # noqa: E402
from benchmarks.harness import Report, Result, Target  # noqa: E402
from benchmarks.report import markdown  # noqa: E402

MACHINE = {"cpu": "AMD EPYC", "cores": 2, "ram_gib": 23.5, "threads": 1, "system": "Linux x86_64"}
SPEED = Report(
    "speed",
    MACHINE,
    {"python": "3.11.7"},
    (Result("a", "x", 0.9, "ratio", 0.8, 1.0, Target(0.95)), Result("a", "y", 2.5, "ms", target=Target(3, False))),
    date="2026-01-02",
    commands=("python -m benchmarks speed",),
)
GRID = replace(
    SPEED,
    benchmark="quality",
    grid=True,
    results=(
        Result("one", "right: steered", 0.25, "", 0.1, 0.4),
        Result("one", "right: minus unsteered", -0.05, "", -0.2, 0.1),
        Result("two", "right: steered", 0.5, "", 0.375, 0.625),
        Result("two", "cost: perplexity", 12.5, ""),
        Result("two", "cost: p", 0.00003, ""),
    ),
)
PAGE = """# Results

<!-- summary: begin -->
<!-- summary: end -->

## Results

### `speed`, by hand

<!-- speed: begin, text of 2026-01-02 -->
<!-- speed: end -->

### Of quality

<!-- quality: begin -->
<!-- quality: end -->
"""
REPORTS = {"speed": SPEED, "quality": GRID}


def test_a_page_is_written_from_its_reports_and_stays_as_it_is() -> None:
    text = page.rendered(PAGE, REPORTS)
    assert page.rendered(text, REPORTS) == text
    assert markdown(SPEED) in text
    about = ("2026-01-02", "AMD EPYC, 1 thread", "1 of 2 hold; misses a: x 0.9, not >= 0.95", "`speed`")
    assert f"| [speed](#speed-by-hand) | {' | '.join(about)} |" in text
    assert "[quality](#of-quality)" in text
    assert (
        re.sub(r"begin(.*?) -->.*?<!--", r"begin\1 -->\n<!--", text, flags=re.DOTALL) == PAGE
    )  # the rest is untouched


def test_a_grid_has_each_figure_in_its_row_and_column() -> None:
    tables = [part.splitlines() for part in re.findall(r"(?:^\|.*\n)+", markdown(GRID), flags=re.MULTILINE)]
    cells = [[[cell.strip() for cell in line[1:-1].split("|")] for line in lines] for lines in tables]
    assert cells[0][0] == ["", "steered", "minus unsteered"]
    assert cells[0][2:] == [
        ["one", "0.250 [0.100, 0.400]", "-0.05 [-0.20, +0.10]"],
        ["two", "0.500 [0.375, 0.625]", ""],
    ]
    assert cells[1][2:] == [["two", "12.5", "3e-05"]]  # the other case isn't in this table


def test_a_text_that_is_older_than_its_table_is_said_to_be() -> None:
    notice = "*The text of this section was written for the run of 2026-01-02.*"
    newer = {**REPORTS, "speed": replace(SPEED, date="2026-02-01")}
    assert notice not in page.rendered(PAGE, REPORTS)
    text = page.rendered(PAGE, newer)
    assert notice in text
    assert notice not in page.rendered(text.replace("text of 2026-01-02", "text of 2026-02-01"), newer)


@pytest.mark.parametrize(
    ("text", "reports", "says"),
    [
        (PAGE, {"speed": SPEED}, "quality.json"),
        (PAGE, {**REPORTS, "other": SPEED}, "no place for other"),
        (PAGE + PAGE, REPORTS, "two places for quality, speed, summary"),
        ("", {}, "no place for summary"),
    ],
)
def test_places_and_reports_must_match(text: str, reports: dict[str, Report], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        page.rendered(text, reports)


def test_a_new_report_is_taken_and_one_without_a_date_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(page, "REPORTS", tmp_path / "results")
    page.REPORTS.mkdir()
    page.PAGE.write_text("<!-- summary: begin -->\n<!-- summary: end -->\n\n## Results\n")
    file = tmp_path / "new.json"
    file.write_text(json.dumps(replace(SPEED, date="", commands=()).to_json()))
    take = {"name": None, "date": None, "command": None, "note": None, "check": False}
    with pytest.raises(typer.Exit):
        page.results(add=[file], **take)
    assert not list(page.REPORTS.iterdir())
    page.results(add=[file], **{**take, "date": "2026-03-01", "command": ["make it"], "note": "quiet"})
    kept = page.read(page.REPORTS / "speed.json")
    assert kept == replace(SPEED, date="2026-03-01", commands=("make it",), machine={**MACHINE, "note": "quiet"})
    assert "### `speed`" in page.PAGE.read_text()
    page.results(add=None, **{**take, "check": True})
    page.PAGE.write_text(page.PAGE.read_text().replace("0.9", "0.99"))
    with pytest.raises(typer.Exit):
        page.results(add=None, **{**take, "check": True})


def decision(after: float, p: float, candidates: int = 1) -> dict[str, object]:
    return {
        "after": after,
        "p": p,
        "candidates": candidates,
        "difference": {"estimate": after, "low": 0.0, "high": 1.0},
    }


def cell(nats: float | None, after: float, p: float, **controls: float) -> dict[str, object]:
    return {"nats": nats, "decision": decision(after, p, 2), "random": None, "orthogonal": None, **controls}


BENCH = {
    "about": {"versions": {"trimtab": "1.0"}, "model": {"name": "tiny"}},
    "verdict": [],
    "methods": [],
    "tasks": [
        {
            "task": "title",
            "items": 8,
            "unit": "share",
            "unsteered": 0.0,
            "told": {"prompt": decision(0.5, 0.25)},
            "rows": [
                {"method": "caa", "at_nats": 4.0, "cells": [cell(1.0, 0.75, 0.5), cell(4.0, 0.25, 0.01, random=0.125)]},
                {"method": "directer", "at_nats": None, "cells": [cell(None, 0.75, 0.875, span=0.5)]},
            ],
        }
    ],
}


def test_results_of_trimtab_bench_are_a_table_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(page, "REPORTS", tmp_path / "results")
    page.REPORTS.mkdir()
    page.PAGE.write_text("<!-- summary: begin -->\n<!-- summary: end -->\n\n## Results\n")
    file = tmp_path / "results.json"
    file.write_text(json.dumps(BENCH))
    take = {"name": None, "date": "2026-03-01", "command": ["trimtab bench"], "note": "quiet", "check": False}
    with pytest.raises(typer.Exit):  # results.json has no name of its own
        page.results(add=[file], **take)
    with pytest.raises(ValueError, match="has no 'run'"):
        page.read(file)
    page.results(add=[file], **{**take, "name": "tiny"})
    text = page.PAGE.read_text()
    lines = [[part.strip() for part in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]
    assert "### `bench-tiny`" in text
    assert "title (8 items, share):" in text
    assert ["", "score", "minus unsteered", "p", "p, random span", "p, random", "nats"] in lines
    assert ["unsteered", "0.00", "", "", "", "", ""] in lines
    assert ["prompt", "0.50", "0.50 [0.00, 1.00]", "0.25", "", "", ""] in lines
    assert ["caa", "0.25", "0.25 [0.00, 1.00]", "0.02", "", "0.125", "4"] in lines
    assert lines.index(["directer", "0.75", "0.75 [0.00, 1.00]", "1.00", "0.5", "", ""]) < len(lines) - 1
    page.results(add=None, **{**take, "check": True})
    stored = page.REPORTS / "bench" / "tiny.json"
    stored.write_text(stored.read_text().replace("0.125", "0.25"))
    with pytest.raises(typer.Exit):
        page.results(add=None, **{**take, "check": True})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"holds": True}, "'holds' is True"),
        ({"target": "about 1"}, "begins with >= or <="),
        ({"value": "fast"}, "isn't the report"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(change: dict[str, object], says: str, tmp_path: Path) -> None:
    data = SPEED.to_json()
    data["results"][0].update(change)
    file = tmp_path / "x.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=says) as raised:
        page.read(file)
    assert str(file) in str(raised.value)
