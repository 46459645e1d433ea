"""`trimtab eval ifeval`: how often are instructions followed, as checked by code?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table

from trimtab.commands.arms import BASELINE, REPEATED, Arm, ArmOptions
from trimtab.commands.eval import evaluations
from trimtab.commands.eval_common import (
    Run,
    RunOptions,
    check_targets,
    facts_of,
    finish,
    format_dose,
    line_of,
    table_of,
)
from trimtab.commands.model import EngineModelOptions, JsonOption
from trimtab.commands.options import grouped
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.evaluate.records import Record
    from trimtab.evaluate.summary import Line

SCORES = ("strict", "loose")


@evaluations.command()
@grouped
def ifeval(
    *,
    arms: ArmOptions,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl file in IFEval's format, with or without pairs. Default: google/IFEval from the Hub."
        ),
    ] = None,
    without_instruction: Annotated[
        bool,
        typer.Option("--without-instruction", help="Remove the instruction from the prompt; needs a file of pairs."),
    ] = False,
    repeat_instruction: Annotated[
        bool,
        typer.Option(
            "--repeat-instruction", help=f"One more arm, “{REPEATED}”: unsteered, with the instructions repeated."
        ),
    ] = False,
    official: Annotated[
        bool,
        typer.Option("--official", help="Like the official checker, accept answers whose language can't be detected."),
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only this many prompts, from the start of the file.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer, in every arm.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch, over all arms.")] = 64,
    options: RunOptions,
    loader: EngineModelOptions,
    json: JsonOption = False,
) -> None:
    """IFEval: how often are instructions followed, as checked by code?

    [bold]  trimtab eval ifeval --steer caps.safetensors --out caps.jsonl
      trimtab eval ifeval --data pairs.jsonl --without-instruction \\
        --steer caps.safetensors --strength 0.5,1 --random 2
      trimtab eval ifeval --data pairs.jsonl --limit 50 --json > summary.json[/bold]

    Each prompt is answered unsteered and under each steering, greedily and with the same
    stop rules. An answer is strictly correct if it follows every instruction unchanged,
    and loosely correct if it does so after one of the lenient edits of the benchmark (a
    first or last line dropped, asterisks removed). By instruction: the share of single
    instructions followed. Intervals are 95 % bootstrap intervals, and differences are
    paired with the unsteered answers. won/lost counts the prompts whose loose result
    changed, and p is McNemar's exact test on them.

    A file in IFEval's format has on each line

    [dim]    {"key": 1, "prompt": "Name a fruit. Use no commas.",
         "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}],
         "prompt_without_instruction": "Name a fruit."}[/dim]

    where only --without-instruction needs the last key. Rows of IFBench work as well.

    With --out, the same command resumes an interrupted run, and ends with the same
    file.
    """
    plan = arms.plan()
    if repeat_instruction and without_instruction:
        raise TrimtabError("--repeat-instruction repeats what --without-instruction removes; leave one of them out")
    check_targets(options.out, None)

    from trimtab.evaluate.ifeval import ifeval_requests, read_ifeval, scorer, with_repeated_instructions

    items = read_ifeval(data, limit)
    baseline_requests = ifeval_requests(items, {BASELINE: None}, without_instruction=without_instruction)
    prompts = [request.prompt for request in baseline_requests]
    run = Run.start(plan, loader, options, prompts, batch_size=batch_size, quiet=json)
    requests = ifeval_requests(items, run.steerings, run.systems, without_instruction=without_instruction)
    compared = dict(run.arms)
    if repeat_instruction:
        requests += ifeval_requests(with_repeated_instructions(items), {REPEATED: None})
        compared[REPEATED] = Arm(about={"kind": "repeated"})
    rule = "official" if official else "required"
    checkers = f"if-verifiable {version('if-verifiable')}"
    about = {"evaluation": "ifeval", "checkers": checkers, "detection": rule}
    score = scorer(items, detection="official" if official else "required")
    records = run.answer_requests(requests, score, about, max_new_tokens=max_new_tokens)
    document: dict[str, Any] = {
        "evaluation": "ifeval",
        "model": run.lm.name,
        **_summary(records, compared),
        "steerings": {
            name: {key: arm.about[key] for key in ("file", "layers", "strength")}
            for name, arm in run.arms.items()
            if arm.about["kind"] == "steered"
        },
        "data": "google/IFEval" if data is None else str(data),
        "prompts": len(items),
        "without_instruction": without_instruction,
        "detection": rule,
        "max_new_tokens": max_new_tokens,
    }
    title = f"IFEval on {run.lm.name}, {len(items)} prompts, at most {max_new_tokens} tokens an answer"
    finish(document, title, "", *_tables(document), out=options.out, json=json)


def _summary(records: Sequence[Record], arms: Mapping[str, Arm]) -> dict[str, Any]:
    """The results by arm, by prompt, by single instruction, and by type of instruction."""
    from trimtab.evaluate.ifeval import by_instruction, type_of
    from trimtab.evaluate.summary import summarize

    single, records_by_arm = by_instruction(records), {name: [r for r in records if r.arm == name] for name in arms}
    lines = {
        "by_prompt": summarize(records, SCORES, baseline=BASELINE),
        "by_instruction": _without_p(summarize(single, SCORES, baseline=BASELINE)),
        "by_type": _without_p(summarize(single, SCORES, baseline=BASELINE, key=type_of)),
    }
    return {
        "baseline": BASELINE,
        "arms": {name: {**arm.about, **_facts(records_by_arm[name])} for name, arm in arms.items()},
        **{part: [line.to_json() for line in part_lines] for part, part_lines in lines.items()},
    }


def _facts(records: Sequence[Record]) -> dict[str, Any]:
    return {
        **facts_of(records),
        "steered": sum(bool(record.edits) for record in records),
        "empty": sum(not record.answer.strip() for record in records),
    }


def _without_p(lines: Sequence[Line]) -> list[Line]:
    """Drop the p-values: the instructions of one prompt aren't independent, as McNemar's test assumes."""
    return [
        line if line.difference is None else replace(line, difference=replace(line.difference, p=None))
        for line in lines
    ]


def _tables(document: Mapping[str, Any]) -> list[RenderableType]:
    parts = [
        _means_table(document, "by_prompt", "prompts followed"),
        _difference_table(document),
        _means_table(document, "by_instruction", "instructions followed"),
        _types_table(document),
        _facts_table(document),
    ]
    return [line for part in parts if part is not None for line in (part, "")]


def _means_table(document: Mapping[str, Any], part: str, title: str) -> Table:
    table = table_of(title, *SCORES)
    for arm in document["arms"]:
        table.add_row(arm, *(_mean(line_of(document[part], arm, score)["mean"]) for score in SCORES))
    return table


def _difference_table(document: Mapping[str, Any]) -> Table | None:
    arms = [arm for arm in document["arms"] if arm != document["baseline"]]
    if not arms:
        return None
    table = table_of(f"minus {document['baseline']}", "strict", "loose", "won/lost", "p")
    for arm in arms:
        strict, loose = (line_of(document["by_prompt"], arm, score)["difference"] for score in SCORES)
        p = "" if loose["p"] is None else f"{loose['p']:.2g}"
        means = [_mean(difference["mean"], sign=True) for difference in (strict, loose)]
        table.add_row(arm, *means, f"{loose['better']}/{loose['worse']}", p)
    return table


def _types_table(document: Mapping[str, Any]) -> Table:
    arms = list(document["arms"])
    table = table_of("loose, by type", "n", *arms)
    rows: dict[str, dict[str, Any]] = {}
    for line in document["by_type"]:
        if line["score"] == "loose":
            rows.setdefault(line["key"], {})[line["arm"]] = line
    for kind, by_arm in rows.items():
        means = [f"{by_arm[arm]['mean']['estimate']:.0%}" if arm in by_arm else "" for arm in arms]
        table.add_row(kind, str(by_arm[document["baseline"]]["n"]), *means)
    return table


def _facts_table(document: Mapping[str, Any]) -> Table:
    table = table_of("the answers", "steered", "dose", "tokens", "cut at the limit", "empty")
    for arm, facts in document["arms"].items():
        counts = [str(facts[name]) for name in ("steered", "cut", "empty")]
        table.add_row(arm, counts[0], format_dose(facts["mean_dose"]), f"{facts['mean_tokens']:.0f}", *counts[1:])
    return table


def _mean(interval: Mapping[str, float], sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    low, high = (100 * interval[name] for name in ("low", "high"))
    return f"{100 * interval['estimate']:{form}} % [{low:{form}}, {high:{form}}]"
