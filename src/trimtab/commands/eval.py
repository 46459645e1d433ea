"""`trimtab eval`: does a steering do what it should? One command a benchmark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from trimtab.commands.model import JsonOption, ModelOptions
from trimtab.commands.options import grouped
from trimtab.commands.terminal import note, progress_bar, show, write_json
from trimtab.errors import TrimtabError
from trimtab.files.pick import FORM, Pick, parse_pick
from trimtab.files.target import check_target

if TYPE_CHECKING:
    from trimtab.evaluate.ifeval import IFEvalItem
    from trimtab.evaluate.records import Record
    from trimtab.evaluate.summary import Line
    from trimtab.lm import LM
    from trimtab.steering import Steering

BASELINE = "unsteered"
REPEATED = "said twice"

evaluations = typer.Typer(
    name="eval",
    help="Measure what a steering does, arm against arm, with intervals.",
    rich_markup_mode="rich",
    no_args_is_help=True,
)


@evaluations.command()
@grouped
def ifeval(
    *,
    steer: Annotated[
        list[str] | None,
        typer.Option(
            help="A steering file; after @, which of its layers act (14, 14,15, 10-14), after a colon a strength to"
            " multiply it by. Each is an arm of its own.",
            metavar=FORM,
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl file in IFEval's format, with or without pairs. Without it: google/IFEval from the Hub.",
            show_default=False,
        ),
    ] = None,
    without_instruction: Annotated[
        bool,
        typer.Option("--without-instruction", help="Take the instruction out of the prompt; needs a file of pairs."),
    ] = False,
    repeat_instruction: Annotated[
        bool,
        typer.Option(
            "--repeat-instruction", help=f"One more arm, “{REPEATED}”: unsteered, the instructions said again."
        ),
    ] = False,
    random: Annotated[
        int, typer.Option(min=0, metavar="N", help="For each steering, N arms pushed as hard in random directions.")
    ] = 0,
    official: Annotated[
        bool,
        typer.Option("--official", help="As the official checker, pass answers whose language can't be detected."),
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.", show_default=False)] = None,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="Allow a steering learned on another model of the same width.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most, in every arm.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time, of all arms together.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl file to write each answer to as it comes. If there, the run in it goes on.",
            show_default=False,
        ),
    ] = None,
    loader: ModelOptions,
    json: JsonOption = False,
) -> None:
    """IFEval: how often are instructions followed, by code that checks?

    [bold]  trimtab eval ifeval --steer caps.safetensors --out caps.jsonl
      trimtab eval ifeval --data pairs.jsonl --without-instruction \\
        --steer caps.safetensors:0.5 --steer caps.safetensors:1 --random 2
      trimtab eval ifeval --data pairs.jsonl --limit 50 --json > summary.json[/bold]

    Each prompt is answered unsteered and under each steering, greedily and under the
    same stop rules. An answer counts as strict when it follows every instruction as it
    stands, as loose when it does after one of the lenient edits of the benchmark (a
    first or last line dropped, asterisks removed). By instruction: the share of single
    instructions followed. Intervals are 95 % bootstrap intervals, differences are paired
    with the unsteered answers; won/lost counts the prompts that changed by the loose rule,
    and p is McNemar's exact test on them.

    A file of IFEval's format has on each line

    [dim]    {"key": 1, "prompt": "Name a fruit. Use no commas.",
         "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}],
         "prompt_without_instruction": "Name a fruit."}[/dim]

    the last of which only --without-instruction needs. IFBench's rows are checked as well.

    With --out, a run that was interrupted goes on where it was when the same command
    is given again, and ends with the same file.
    """
    if random and not steer:
        raise TrimtabError("--random needs a steering to be as strong as; give --steer FILE")
    if repeat_instruction and without_instruction:
        raise TrimtabError("--repeat-instruction says again what --without-instruction takes out; leave one of them")
    if out is not None:
        check_target(out, ".jsonl")
    files = _named([parse_pick(text) for text in steer or []])

    from trimtab.evaluate.answers import answer
    from trimtab.evaluate.ifeval import read_ifeval, repeated, requests_of, scorer

    items = read_ifeval(data, limit)
    steerings = {name: pick.load() for name, pick in files.items()}
    arms: dict[str, Steering | None] = {BASELINE: None, **steerings}
    requests_of(items, {}, without_instruction=without_instruction)  # a file without pairs is refused at once
    lm = loader.load(quiet=json)
    if random:
        for steering in steerings.values():
            lm.check(steering, transfer=transfer)
        arms |= _controls(lm, steerings, items, random, without_instruction)
    requests = requests_of(items, arms, without_instruction=without_instruction)
    if repeat_instruction:
        requests += requests_of(repeated(items), {REPEATED: None})
    rule = "official" if official else "required"
    try:
        with progress_bar("answering", quiet=json) as progress:
            records = answer(
                lm,
                requests,
                score=scorer(items, detection="official" if official else "required"),
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                out=out,
                transfer=transfer,
                progress=progress,
                about={"evaluation": "ifeval", "checkers": _checkers(), "detection": rule},
            )
    except KeyboardInterrupt:
        if out is not None:
            note(f"what was answered is in {out}; the same command goes on from there", quiet=json)
        raise
    document = summary_of(records, lm.name)
    document["steerings"] = {name: pick.to_json() for name, pick in files.items()}
    document |= {"data": "google/IFEval" if data is None else str(data), "prompts": len(items)}
    document |= {"without_instruction": without_instruction, "detection": rule, "max_new_tokens": max_new_tokens}
    if out is not None:
        document["records"] = str(out)
    if json:
        write_json(document)
        return
    _print(document, lm.name, len(items))
    if out is not None:
        note(f"every answer is in {out}", quiet=False)


def summary_of(records: Sequence[Record], model: str) -> dict[str, Any]:
    """The numbers of an evaluation with IFEval: by arm, by single instruction, and by type of instruction."""
    from trimtab.evaluate.ifeval import by_instruction, type_of
    from trimtab.evaluate.summary import summarize

    single = by_instruction(records)
    scores = ("strict", "loose")
    arms = sorted({record.arm for record in records}, key=lambda arm: (arm != BASELINE, arm))
    return {
        "model": model,
        "baseline": BASELINE,
        "arms": {arm: _arm([record for record in records if record.arm == arm]) for arm in arms},
        "by_prompt": _plain(summarize(records, scores, baseline=BASELINE)),
        "by_instruction": _plain(_without_p(summarize(single, scores, baseline=BASELINE))),
        "by_type": _plain(_without_p(summarize(single, scores, baseline=BASELINE, key=type_of))),
    }


def _named(files: Sequence[Pick]) -> dict[str, Pick]:
    """The arms' names: the file's, its layers where some are picked, and the strength where it isn't 1."""
    named: dict[str, Pick] = {}
    for pick in files:
        if pick in named.values():
            raise TrimtabError(f"--steer {pick} is given twice; each arm once is enough")
        name = f"{pick.path.stem}{pick.where}" + ("" if pick.strength == 1 else f":{pick.strength:g}")
        taken = name in named or name in (BASELINE, REPEATED)
        named[f"{pick.path}{pick.where}:{pick.strength:g}" if taken else name] = pick
    return named


def _controls(
    lm: LM, steerings: Mapping[str, Steering], items: Sequence[IFEvalItem], count: int, bare: bool
) -> dict[str, Steering | None]:
    """`count` random arms like each steering. Where projections are set, pushes are matched on these prompts."""
    from trimtab.evaluate.controls import means_for, random_like

    prompts = [str(item.prompt_without_instruction if bare else item.prompt) for item in items]
    means = means_for(lm, steerings.values(), prompts)
    return {
        f"{name}, random {seed}": random_like(steering, seed, means)
        for name, steering in steerings.items()
        for seed in range(1, count + 1)
    }


def _checkers() -> str:
    from importlib.metadata import version

    return f"if-verifiable {version('if-verifiable')}"


def _arm(records: Sequence[Record]) -> dict[str, Any]:
    count = len(records)
    return {
        "prompts": count,
        "steered": sum(bool(record.edits) for record in records),
        "mean_dose": sum(record.dose for record in records) / count,
        "mean_tokens": sum(record.tokens for record in records) / count,
        "cut": sum(record.finish == "length" for record in records),
        "empty": sum(not record.answer.strip() for record in records),
    }


def _without_p(lines: Sequence[Line]) -> list[Line]:
    """Instructions of one prompt aren't independent, and McNemar's test takes them for it."""
    from dataclasses import replace

    return [
        line if line.difference is None else replace(line, difference=replace(line.difference, p=None))
        for line in lines
    ]


def _plain(lines: Sequence[Line]) -> list[dict[str, Any]]:
    return [line.to_json() for line in lines]


def _print(document: Mapping[str, Any], model: str, prompts: int) -> None:
    show(f"IFEval on {model}, {prompts} prompts, at most {document['max_new_tokens']} tokens an answer", "")
    parts = [
        _means_table(document, "by_prompt", "prompts followed"),
        _difference_table(document),
        _means_table(document, "by_instruction", "instructions followed"),
        _types_table(document),
        _facts_table(document),
    ]
    show(*(line for part in parts if part is not None for line in (part, "")))


def _means_table(document: Mapping[str, Any], part: str, title: str) -> Table:
    table = _table(title, "strict", "loose")
    for arm in document["arms"]:
        table.add_row(arm, *(_mean(_find(document[part], arm, score)["mean"]) for score in ("strict", "loose")))
    return table


def _difference_table(document: Mapping[str, Any]) -> Table | None:
    arms = [arm for arm in document["arms"] if arm != document["baseline"]]
    if not arms:
        return None
    table = _table(f"minus {document['baseline']}", "strict", "loose", "won/lost", "p")
    for arm in arms:
        strict, loose = (_find(document["by_prompt"], arm, score)["difference"] for score in ("strict", "loose"))
        p = "" if loose["p"] is None else f"{loose['p']:.2g}"
        means = [_mean(one["mean"], sign=True) for one in (strict, loose)]
        table.add_row(arm, *means, f"{loose['better']}/{loose['worse']}", p)
    return table


def _types_table(document: Mapping[str, Any]) -> Table:
    arms = list(document["arms"])
    table = _table("loose, by type", "n", *arms)
    rows: dict[str, dict[str, Any]] = {}
    for line in document["by_type"]:
        if line["score"] == "loose":
            rows.setdefault(line["key"], {})[line["arm"]] = line
    for kind, found in rows.items():
        means = [f"{found[arm]['mean']['estimate']:.0%}" if arm in found else "" for arm in arms]
        table.add_row(kind, str(found[document["baseline"]]["n"]), *means)
    return table


def _facts_table(document: Mapping[str, Any]) -> Table:
    table = _table("the answers", "steered", "dose", "tokens", "cut at the limit", "empty")
    for arm, facts in document["arms"].items():
        counts = [str(facts[name]) for name in ("steered", "cut", "empty")]
        table.add_row(arm, counts[0], _dose(facts["mean_dose"]), f"{facts['mean_tokens']:.0f}", *counts[1:])
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(first, *columns, box=None, header_style="dim", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _find(lines: Sequence[Mapping[str, Any]], arm: str, score: str) -> Mapping[str, Any]:
    return next(line for line in lines if line["arm"] == arm and line["score"] == score)


def _mean(interval: Mapping[str, float], sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    low, high = (100 * interval[name] for name in ("low", "high"))
    return f"{100 * interval['estimate']:{form}} % [{low:{form}}, {high:{form}}]"


def _dose(value: float) -> str:
    return "" if value == 0 or not math.isfinite(value) else f"{value:.2g}"
