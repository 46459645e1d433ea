"""`trimtab eval refusal`: are harmful requests refused, and harmless ones answered?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.commands.arms import LayersOption, Plan, RandomOption, SteerOption, StrengthOption, SystemOption
from trimtab.commands.eval import evaluations
from trimtab.commands.eval_common import (
    LimitOption,
    OutOption,
    ReportOption,
    TransferOption,
    check_targets,
    document_of,
    find_data,
    resumable,
    scores_table,
)
from trimtab.commands.eval_report import sweep_page
from trimtab.commands.model import JsonOption, ModelOptions
from trimtab.commands.options import grouped
from trimtab.commands.terminal import note, progress_bar, show, write_json

FILES = ("advbench/harmful_behaviors.csv", "refusal/harmful_test.json", "xstest/xstest_prompts.csv")
COLUMNS = {"refused": "refused", "empty": "empty"}


@evaluations.command()
@grouped
def refusal(
    *,
    data: Annotated[
        list[Path],
        typer.Option(
            help=f"A folder with {', '.join(FILES)} (what is there of them), or a file. May be given several times.",
            show_default=False,
        ),
    ],
    steer: SteerOption = None,
    strength: StrengthOption = None,
    layers: LayersOption = None,
    random: RandomOption = 0,
    system_prompt: SystemOption = None,
    limit: LimitOption = None,
    transfer: TransferOption = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most, in every arm.")] = 48,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at a time, of all arms together.")] = 64,
    out: OutOption = None,
    report: ReportOption = None,
    loader: ModelOptions,
    json: JsonOption = False,
) -> None:
    """Refusal: how often are harmful requests refused, and harmless ones too?

    [bold]  trimtab eval refusal --data data/ --steer refusal.safetensors --strength -1,1
      trimtab eval refusal --data xstest_prompts.csv --limit 50 --json[/bold]

    Each request is answered greedily in every arm. An answer is a refusal when its first
    160 characters hold one of a list of phrases ("I'm sorry", "I cannot", "as an AI" …;
    trimtab.evaluate.refusal.PHRASES); no model judges. Each set has a table of its own:
    in harmful sets a high share is wanted, in XSTest's safe prompts a low one, for these
    only sound harmful. --limit takes so many of each set.

    Files: AdvBench's .csv (goal), XSTest's .csv (prompt, label), or a .json list of
    objects with an instruction.
    """
    plan = Plan.of(steer, strength, layers, random, system_prompt)
    check_targets(out, report)

    from trimtab.evaluate.answers import answer
    from trimtab.evaluate.refusal import SCORES, part_of, read_refusal, requests_of, score

    files = list(dict.fromkeys(file for path in data for file in find_data(path, FILES, "refusals")))
    items = [item for file in files for item in read_refusal(file, limit)]
    harmful = {item.part: item.harmful for item in items}
    arms = plan.arms()
    lm = loader.load(quiet=json)
    arms |= plan.controls(lm, arms, [item.prompt for item in items], transfer=transfer)
    systems = {name: arm.system for name, arm in arms.items() if arm.system is not None}
    requests = requests_of(items, {name: arm.steering for name, arm in arms.items()}, systems)
    with resumable(out, quiet=json), progress_bar("answering", quiet=json) as progress:
        records = answer(
            lm,
            requests,
            score=score,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            out=out,
            transfer=transfer,
            progress=progress,
            about={"evaluation": "refusal"},
        )
    from trimtab.evaluate.summary import summarize

    document: dict[str, Any] = {
        "evaluation": "refusal",
        "model": lm.name,
        "data": [str(file) for file in files],
        "items": len(items),
        "max_new_tokens": max_new_tokens,
        "harmful": harmful,
        **document_of(records, arms, SCORES, None),
        "by_part": [line.to_json() for line in summarize(records, SCORES, baseline="unsteered", key=part_of)],
    }
    if out is not None:
        document["records"] = str(out)
    if report is not None:
        sweep_page(report, document, arms, records, f"refusals on {lm.name}, {len(items)} requests", COLUMNS)
        document["report"] = str(report)
    if json:
        write_json(document)
        return
    show(f"Refusals on {lm.name}, {len(items)} requests, at most {max_new_tokens} tokens an answer", "")
    for part, bad in harmful.items():
        wanted = "harmful: high is wanted" if bad else "harmless: low is wanted"
        show(f"{part} ({wanted})", scores_table(document, COLUMNS, part), "")
    for path in (out, report):
        if path is not None:
            note(f"wrote {path}", quiet=False)
