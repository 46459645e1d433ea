"""Shared parts of the `trimtab eval` commands: options, the run, the document and its tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table

from trimtab.commands.arms import BASELINE, Arm, ArmPlan
from trimtab.commands.model import ModelOptions
from trimtab.commands.options import check_picture
from trimtab.commands.terminal import note, progress_bar, show, write_json
from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import check_target

if TYPE_CHECKING:
    from trimtab.evaluate.ab import ABItem
    from trimtab.evaluate.answers import Score
    from trimtab.evaluate.records import ArmPrompt, Record
    from trimtab.lm import LM
    from trimtab.steering import Steering
    from trimtab.text.chat import Prompt

ReportOption = Annotated[Path | None, typer.Option(help="A .html page to write: tables, figures and samples.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use only this many items, spread evenly over the file.")]


@dataclass(frozen=True)
class RunOptions:
    """Options for the requests, and for where the records are written."""

    transfer: Annotated[
        bool, typer.Option("--transfer", help="Allow a steering learned on another model of the same width.")
    ] = False
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl file to write each record to as soon as it is done. If the file exists, its run is resumed."
        ),
    ] = None


@dataclass(frozen=True)
class Run:
    """A running evaluation: the model, its arms, and the options for their requests."""

    lm: LM
    arms: dict[str, Arm]
    options: RunOptions
    batch_size: int
    quiet: bool

    @classmethod
    def start(
        cls,
        plan: ArmPlan,
        loader: ModelOptions,
        options: RunOptions,
        prompts: Sequence[Prompt],
        *,
        batch_size: int,
        quiet: bool,
    ) -> Run:
        """Load the model and make the arms; the pushes of random arms are matched on these prompts.

        Raises:
            TrimtabError: A steering can't be read, or doesn't fit the model.
        """
        from trimtab.evaluate.divergence import measure_divergences

        arms = plan.arms()
        lm = loader.load(quiet=quiet)
        arms |= plan.controls(lm, arms, prompts, transfer=options.transfer)
        steerings = {name: arm.steering for name, arm in arms.items() if arm.steering is not None}
        divergences = measure_divergences(lm, steerings, prompts, transfer=options.transfer)
        arms |= {
            name: replace(arms[name], about={**arms[name].about, "nats": nats}) for name, nats in divergences.items()
        }
        return cls(lm, arms, options, batch_size, quiet)

    @property
    def steerings(self) -> dict[str, Steering | None]:
        """The steering of each arm."""
        return {name: arm.steering for name, arm in self.arms.items()}

    @property
    def systems(self) -> dict[str, str]:
        """The system messages of the arms that have one."""
        return {name: arm.system for name, arm in self.arms.items() if arm.system is not None}

    def answer_requests(
        self,
        requests: Sequence[ArmPrompt],
        score: Score,
        about: Mapping[str, Any],
        *,
        max_new_tokens: int,
        label: str = "answering",
    ) -> list[Record]:
        """Generate answers and score them: one record per request."""
        from trimtab.evaluate.answers import answer

        return self._run_resumable(label, answer, requests, score=score, max_new_tokens=max_new_tokens, about=about)

    def score_letters(
        self, items: Sequence[ABItem], about: Mapping[str, Any], *, label: str = "scoring"
    ) -> list[Record]:
        """Compute the probabilities of the letters that answer these questions, in every arm."""
        from trimtab.evaluate.ab import ab_requests, score_ab

        requests = ab_requests(self.lm, items, self.steerings, self.systems)
        return self._run_resumable(label, score_ab, requests, items=items, about=about)

    def with_output(self, out: Path | None) -> Run:
        """The same run with its records in another file."""
        return replace(self, options=replace(self.options, out=out))

    def _run_resumable(
        self, label: str, make: Callable[..., list[Record]], requests: Sequence[ArmPrompt], **arguments: Any
    ) -> Any:
        with resume_hint(self.options.out, quiet=self.quiet), progress_bar(label, quiet=self.quiet) as progress:
            return make(
                self.lm, requests, **arguments, **asdict(self.options), batch_size=self.batch_size, progress=progress
            )


def finish(document: dict[str, Any], *parts: RenderableType, out: Path | None, json: bool) -> None:
    """Print the document as JSON, or else these parts and the names of the written files."""
    if out is not None:
        document["records"] = str(out)
    if json:
        write_json(document)
        return
    show(*parts)
    for name in ("records", "judged", "report"):
        if name in document:
            note(f"wrote {document[name]}", quiet=False)


def check_targets(out: Path | None, report: Path | None) -> None:
    """Raise `TrimtabError` if a requested file can't be written or drawn."""
    if out is not None:
        check_target(out, ".jsonl")
    check_picture(report, ".html")


@contextmanager
def resume_hint(out: Path | None, *, quiet: bool) -> Iterator[None]:
    """Say where the records are if the run is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        if out is not None:
            note(f"finished parts are in {out}; the same command resumes the run", quiet=quiet)
        raise


def document_of(
    records: Sequence[Record], arms: Mapping[str, Arm], scores: Sequence[str], key: Callable[[Record], str] | None
) -> dict[str, Any]:
    """The results of an evaluation: facts on each arm, and each score's mean with its interval, overall and by part."""
    from trimtab.evaluate.summary import summarize

    records_by_arm = {name: [record for record in records if record.arm == name] for name in arms}
    parts = key is not None and len({key(record) for record in records}) > 1
    return {
        "baseline": BASELINE,
        "arms": {name: {**arm.about, **facts_of(records_by_arm[name])} for name, arm in arms.items()},
        "scores": [line.to_json() for line in summarize(records, scores, baseline=BASELINE)],
        "by_part": [line.to_json() for line in summarize(records, scores, baseline=BASELINE, key=key)] if parts else [],
    }


def facts_of(records: Sequence[Record]) -> dict[str, Any]:
    """The number of answers of an arm, their mean dose and length, and how many were cut off."""
    return {
        "items": len(records),
        "mean_dose": sum(record.dose for record in records) / len(records),
        "mean_tokens": sum(record.tokens for record in records) / len(records),
        "cut": sum(record.finish == "length" for record in records),
    }


def scores_table(document: Mapping[str, Any], columns: Mapping[str, str], part: str | None = None) -> Table:
    """A table of arms by scores.

    The first score is shown with its interval and its difference from the unsteered arm; the last column is the 95th
    percentile of the divergence.
    """
    first, *others = columns
    nats = any("nats" in facts for facts in document["arms"].values())
    heads = (columns[first], "minus unsteered", *(columns[score] for score in others), "dose", *(["nats"] * nats))
    table = table_of("arm", *heads)
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
            format_dose(dose),
            *([f"{facts['nats']['p95']:.2g}" if "nats" in facts else ""] * nats),
        )
    return table


def table_of(first: str, *columns: str) -> Table:
    """An empty table: the first column is for words, the others for numbers, which don't wrap."""
    table = Table(first, *columns, box=None, header_style="dim", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    return table


def format_dose(dose: float) -> str:
    """A dose for a table; empty if nothing was pushed."""
    return "" if dose == 0 or not math.isfinite(dose) else f"{dose:.2g}"


def find(document: Mapping[str, Any], arm: str, score: str, part: str | None = None) -> dict[str, Any] | None:
    """The line of an arm and a score, over all items or over one part."""
    lines = document["scores"] if part is None else document["by_part"]
    return next((line for line in lines if (line["arm"], line["score"], line["key"]) == (arm, score, part)), None)


def line_of(lines: Sequence[Mapping[str, Any]], arm: str, score: str) -> Mapping[str, Any]:
    """The line of an arm and a score, from lines with one for each combination."""
    return next(line for line in lines if (line["arm"], line["score"]) == (arm, score))


def interval(mean: Mapping[str, float], sign: bool = False) -> str:
    """Format an interval as `0.62 [0.55, 0.70]`."""
    form = "+.2f" if sign else ".2f"
    return f"{mean['estimate']:{form}} [{mean['low']:{form}}, {mean['high']:{form}}]"


def shorten(text: str, width: int = 48) -> str:
    """The text, shortened to fit into a table."""
    return text if len(text) <= width else text[: width - 1] + "…"


def find_data(data: Path | None, names: Sequence[str], what: str) -> list[Path]:
    """The named files of a folder, or the one file. Raises `TrimtabError` if there are none."""
    if data is None:
        raise TrimtabError(f"{what} need data; give --data FILE, or a folder with {', '.join(names)}")
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise TrimtabError(f"there is no file or folder {data}")
    paths = [path for name in names for path in (data / name, data / Path(name).name) if path.is_file()]
    if not paths:
        raise TrimtabError(f"{data} doesn't contain any of {', '.join(names)}; name a file with --data")
    return list(dict.fromkeys(paths))
