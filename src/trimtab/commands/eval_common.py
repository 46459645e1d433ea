"""What `trimtab eval ab`, `refusal` and `capability` share: options, the run, the document, tables, the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from trimtab.commands.arms import BASELINE, Arm
from trimtab.commands.terminal import note
from trimtab.errors import TrimtabError
from trimtab.files.target import check_target

if TYPE_CHECKING:
    from trimtab.evaluate.records import Record

OutOption = Annotated[
    Path | None,
    typer.Option(
        help="A .jsonl file to write each record to as it comes. If there, the run in it goes on.", show_default=False
    ),
]
ReportOption = Annotated[
    Path | None, typer.Option(help="A .html page to write: tables, figures and samples.", show_default=False)
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help="Only so many items, evenly from the whole file.", show_default=False)
]
TransferOption = Annotated[
    bool, typer.Option("--transfer", help="Allow a steering learned on another model of the same width.")
]


def check_targets(out: Path | None, report: Path | None) -> None:
    """Raises `TrimtabError` when what is asked for can't be written or drawn."""
    if out is not None:
        check_target(out, ".jsonl")
    if report is not None:
        from trimtab.report.plots import check_matplotlib

        check_target(report, ".html")
        check_matplotlib()


@contextmanager
def resumable(out: Path | None, *, quiet: bool) -> Iterator[None]:
    """Say where an interrupted run's records are."""
    try:
        yield
    except KeyboardInterrupt:
        if out is not None:
            note(f"what was done is in {out}; the same command goes on from there", quiet=quiet)
        raise


def document_of(
    records: Sequence[Record], arms: Mapping[str, Arm], scores: Sequence[str], key: Callable[[Record], str] | None
) -> dict[str, Any]:
    """The numbers of an evaluation: each arm's facts, each score's mean with its interval, and by part of the data."""
    from trimtab.evaluate.summary import summarize

    of = {name: [record for record in records if record.arm == name] for name in arms}
    parts = key is not None and len({key(record) for record in records}) > 1
    return {
        "baseline": BASELINE,
        "arms": {name: {**arm.about, **_facts(of[name])} for name, arm in arms.items()},
        "scores": [line.to_json() for line in summarize(records, scores, baseline=BASELINE)],
        "by_part": [line.to_json() for line in summarize(records, scores, baseline=BASELINE, key=key)] if parts else [],
    }


def _facts(records: Sequence[Record]) -> dict[str, Any]:
    return {
        "items": len(records),
        "mean_dose": sum(record.dose for record in records) / len(records),
        "mean_tokens": sum(record.tokens for record in records) / len(records),
        "cut": sum(record.finish == "length" for record in records),
    }


def scores_table(document: Mapping[str, Any], columns: Mapping[str, str], part: str | None = None) -> Table:
    """Arms by scores. The first score comes with its interval, and with its difference from the unsteered arm."""
    first, *others = columns
    heads = (columns[first], "minus unsteered", *(columns[score] for score in others), "dose")
    table = Table("arm", *heads, box=None, header_style="dim", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for arm, facts in document["arms"].items():
        top = find(document, arm, first, part)
        if top is None:
            continue
        rest = [find(document, arm, score, part) for score in others]
        change, dose = top["difference"], facts["mean_dose"]
        table.add_row(
            shorten(arm),
            interval(top["mean"]),
            "" if change is None else interval(change["mean"], sign=True),
            *("" if line is None else f"{line['mean']['estimate']:.2f}" for line in rest),
            "" if dose == 0 or not math.isfinite(dose) else f"{dose:.2g}",
        )
    return table


def find(document: Mapping[str, Any], arm: str, score: str, part: str | None = None) -> dict[str, Any] | None:
    """The line of an arm and a score, over all items or over those of one part."""
    lines = document["scores"] if part is None else document["by_part"]
    return next((x for x in lines if (x["arm"], x["score"], x["key"]) == (arm, score, part)), None)


def interval(mean: Mapping[str, float], sign: bool = False) -> str:
    """`0.62 [0.55, 0.70]`."""
    form = "+.2f" if sign else ".2f"
    return f"{mean['estimate']:{form}} [{mean['low']:{form}}, {mean['high']:{form}}]"


def shorten(text: str, width: int = 48) -> str:
    """Text that fits into a table."""
    return text if len(text) <= width else text[: width - 1] + "…"


def find_data(data: Path | None, names: Sequence[str], what: str) -> list[Path]:
    """The files of a folder (or the one file). Raises `TrimtabError` when there are none."""
    if data is None:
        raise TrimtabError(f"{what} need their data; give --data FILE, or a folder with {', '.join(names)}")
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise TrimtabError(f"there is no file or folder {data}")
    found = [path for name in names for path in (data / name, data / Path(name).name) if path.is_file()]
    if not found:
        raise TrimtabError(f"{data} has none of {', '.join(names)}; name a file with --data")
    return list(dict.fromkeys(found))
