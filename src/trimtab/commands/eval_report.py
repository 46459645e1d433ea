"""The HTML page of an evaluation, from its document and records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.commands.eval_common import find, interval

if TYPE_CHECKING:
    from trimtab.evaluate.intervals import Interval
    from trimtab.evaluate.records import Record
    from trimtab.report.page import Grid, Picture, Sample
    from trimtab.report.sweep import Cell

SAMPLES = 5
PLAIN = ("evaluation", "model", "data", "items", "polarity", "max_new_tokens")


def sweep_page(
    path: Path,
    document: Mapping[str, Any],
    records: Sequence[Record],
    title: str,
    columns: Mapping[str, str],
    legend: Mapping[str, str],
    *,
    items: str,
    part_of: Callable[[Record], str] | None = None,
    higher_is_better: Mapping[str, bool] | None = None,
    pictures: Sequence[Picture] = (),
) -> None:
    """Write the page: the verdict, facts, a legend, tables for all items and each part, sweeps, samples.

    Args:
        path: The page to write.
        document: The evaluation's document.
        records: The answers of all arms, scored.
        title: The page's title.
        columns: The scores to show, each with the name that the page gives it; the verdict is on the first.
        legend: What each of these names means.
        items: What the items are called.
        part_of: See `verdict_lines`.
        higher_is_better: See `verdict_lines`.
        pictures: More figures.
    """
    from trimtab import __version__
    from trimtab.commands.eval_verdicts import verdict_lines
    from trimtab.report.page import write_page

    facts = [(name, _fact(document[name])) for name in PLAIN if name in document]
    if document.get("excluded"):
        facts.append(("left out", ", ".join(document["excluded"])))
    facts.append(("trimtab", __version__))
    parts = list(dict.fromkeys(line["key"] for line in document["by_part"]))
    grids = [_grid(document, "All items", columns)]
    grids += [_grid(document, str(part), columns, part) for part in parts if len(parts) <= 12]
    drawn = [*_sweeps(document, title, columns), *pictures]
    score, name = next(iter(columns.items()))
    arms = document["arms"]
    verdict = verdict_lines(records, arms, score, name, items=items, part_of=part_of, higher_is_better=higher_is_better)
    meanings = _legend(arms, legend, 1 if higher_is_better is None else len(higher_is_better))
    write_page(path, title, facts, grids, drawn, _samples(records, score), verdict=verdict, legend=meanings)


def _fact(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _legend(arms: Mapping[str, Mapping[str, Any]], legend: Mapping[str, str], parts: int) -> list[tuple[str, str]]:
    """What the verdict, the scores and the other columns of the tables mean."""
    from trimtab.commands.eval_verdicts import describe_test

    entries = [
        ("verdict", describe_test(arms, parts)),
        *legend.items(),
        ("0.62 [0.55, 0.70]", "a mean and its 95 % bootstrap interval"),
        ("minus unsteered", "the difference of the first score from the unsteered arm's, item by item"),
        (
            "dose",
            "the norm of the edits divided by the norm of the activation, at the layer where it is largest, averaged"
            " over the items",
        ),
    ]
    if any(facts["kind"] == "random" for facts in arms.values()):
        entries.append(("random 1", "the same edits with random directions instead, and as large a push"))
    return entries


def _grid(document: Mapping[str, Any], title: str, columns: Mapping[str, str], part: str | None = None) -> Grid:
    from trimtab.report.page import Grid

    first = next(iter(columns))
    rows = []
    for arm, facts in document["arms"].items():
        lines = [find(document, arm, score, part) for score in columns]
        top = find(document, arm, first, part)
        if top is None:
            continue
        change = top["difference"]
        means = [interval(line["mean"]) for line in lines if line]
        rows.append((arm, *means, interval(change["mean"], sign=True) if change else "", f"{facts['mean_dose']:.3g}"))
    return Grid(title, ("arm", *columns.values(), "minus unsteered", "dose"), tuple(rows))


def _sweeps(document: Mapping[str, Any], title: str, columns: Mapping[str, str]) -> list[Picture]:
    """One plot for each steering file and each of the first two scores."""
    from trimtab.report.page import Picture
    from trimtab.report.sweep import draw_sweep

    files = dict.fromkeys(facts["file"] for facts in document["arms"].values() if facts["kind"] == "steered")
    pictures = []
    for file in files:
        for score, name in list(columns.items())[:2]:
            cells = _cells(document, file, score)
            if len({(cell.layer, cell.strength) for cell in cells}) < 2:
                continue
            picture = draw_sweep(
                cells, _interval(document, document["baseline"], score), f"{Path(file).stem}: {title}", name
            )
            pictures.append(Picture(picture, f"{name} by strength and layer, {Path(file).name}"))
    return pictures


def _cells(document: Mapping[str, Any], file: str, score: str) -> list[Cell]:
    from trimtab.report.sweep import Cell

    return [
        Cell(
            layer=facts["layers"][0] if len(facts["layers"]) == 1 else None,
            strength=facts["strength"],
            score=_interval(document, arm, score),
            random=facts["kind"] == "random",
        )
        for arm, facts in document["arms"].items()
        if facts.get("file") == file
    ]


def _interval(document: Mapping[str, Any], arm: str, score: str) -> Interval:
    from trimtab.evaluate.intervals import Interval

    line = find(document, arm, score)
    assert line is not None
    return Interval(**line["mean"])


def _samples(records: Sequence[Record], score: str) -> tuple[Sample, ...]:
    from trimtab.report.page import Sample

    items = list(dict.fromkeys(record.item for record in sorted(records, key=lambda record: record.item)))[:SAMPLES]
    samples = []
    for item in items:
        mine = [record for record in records if record.item == item and "random" not in record.arm]
        prompt = mine[0].prompt if isinstance(mine[0].prompt, str) else mine[0].prompt[-1]["content"]
        answers = tuple((record.arm, f"{record.answer}   ({score} {record.scores[score]:.2f})") for record in mine)
        samples.append(Sample(prompt, answers))
    return tuple(samples)
