"""`trimtab eval ab`: does a steering make the matching one of two answers more probable?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.commands.arms import Arm, ArmOptions
from trimtab.commands.eval import evaluations
from trimtab.commands.eval_common import (
    LimitOption,
    ReportOption,
    Run,
    RunOptions,
    check_targets,
    document_of,
    finish,
    scores_table,
)
from trimtab.commands.eval_report import sweep_page
from trimtab.commands.finetuned import FinetuneOption, load_finetune_pairs, score_finetuned_sides
from trimtab.commands.model import EngineModelOptions, JsonOption
from trimtab.commands.options import grouped
from trimtab.commands.pair_files import ColumnOptions

if TYPE_CHECKING:
    from trimtab.evaluate.ab import ABItem
    from trimtab.evaluate.records import Record
    from trimtab.lm import LM
    from trimtab.report.page import Picture

COLUMNS = {"matching": "p(matching)", "mass": "mass", "chosen": "chosen"}
LEGEND = {
    "p(matching)": "the probability of the letter of the answer that matches the behaviour, as a share of that of both"
    " letters: p(matching) / (p(matching) + p(other))",
    "mass": "the probability of both letters together; if it is small, the model answers with neither, and p(matching)"
    " means nothing",
    "chosen": "the share of questions on which the matching letter is the more probable one",
}
DRAWN_PAIRS = 100
DRAWN_LAYERS = 6


@evaluations.command()
@grouped
def ab(
    *,
    data: Annotated[Path, typer.Option(help="A .json list of two-letter questions, such as CAA's test sets.")],
    arms: ArmOptions,
    exclude: Annotated[
        bool, typer.Option("--exclude", help="Leave out (and name) items whose answers aren't A and B.")
    ] = False,
    both_orders: Annotated[
        bool,
        typer.Option("--both-orders", help="Ask each question twice, (A) and (B) exchanged: no letter is favoured."),
    ] = False,
    limit: LimitOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch, over all arms.")] = 64,
    options: RunOptions,
    report: ReportOption = None,
    finetune: FinetuneOption = None,
    columns: ColumnOptions,
    loader: EngineModelOptions,
    json: JsonOption = False,
) -> None:
    """A or B: how probable is the answer that matches a behaviour?

    [bold]  trimtab eval ab --data refusal/test_dataset_ab.json \\
        --steer refusal.safetensors --strength -2,-1,0,1,2
      trimtab eval ab --data refusal/test_dataset_ab.json \\
        --steer all.safetensors --layers 10,12,14 --strength -1,1 --random 3 \\
        --system-prompt "Refuse." --out ab.jsonl --report ab.html[/bold]

    Nothing is generated: each question and an opening bracket are read, and the score is
    p(matching) / (p(matching) + p(other)) of the next letter. The table also has the
    mass of both letters: if it is small, the share means nothing. Intervals are 95 %
    bootstrap intervals, differences are paired with the unsteered model.

    All arms of a question run together, and their shared prefix is computed once. With
    --finetune, two LoRAs are trained on pairs (other questions than these), one towards
    the positive and one towards the negative sides; each is an arm by itself and with
    each steering.

    Small models prefer one letter whatever it stands for, and almost any vector shifts
    that preference. With --both-orders, each question is also asked with its options
    exchanged, which cancels the preference out; both count as one question in the
    intervals.

    The file is a list of objects

    [dim]    {"question": "Is it so?\\n (A) Yes\\n (B) No",
         "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}[/dim]

    (or with prompt, correct and incorrect). Items with other letters than A and B are
    refused, or with --exclude left out and named. Choose layer and strength on other
    questions than these: the best of many on the same questions looks better than it
    is.
    """
    plan, out = arms.plan(), options.out
    check_targets(out, report)
    pairs = load_finetune_pairs(finetune, columns.to_columns(pairs=finetune is not None, source="--finetune"))

    from trimtab.evaluate.ab import SCORES, category_of, in_both_orders, polarity, read_ab

    items, left_out = read_ab(data, exclude=exclude, limit=limit)
    questions = len(items)
    if both_orders:
        items = in_both_orders(items)
    run = Run.start(plan, loader, options, [item.question for item in items], batch_size=batch_size, quiet=json)

    def score(target_lm: LM, scored_arms: dict[str, Arm], file: Path | None, about: Mapping[str, Any]) -> list[Record]:
        allowed = replace(options, transfer=True) if target_lm is not run.lm else options  # finetuned: another model
        return (
            replace(run, lm=target_lm, arms=scored_arms, options=allowed)
            .with_output(file)
            .score_letters(items, {"evaluation": "ab", **about})
        )

    records, compared = score(run.lm, run.arms, out, {}), dict(run.arms)
    if pairs:
        for side_arms, side_records in score_finetuned_sides(run.lm, pairs, run.arms, out, score, quiet=json):
            compared |= side_arms
            records += side_records
    document: dict[str, Any] = {
        "evaluation": "ab",
        "model": run.lm.name,
        "data": str(data),
        "items": questions,
        "both_orders": both_orders,
        "polarity": polarity(data),
        "excluded": left_out,
        **document_of(records, compared, SCORES, category_of),
    }
    if finetune is not None:
        document["finetune"] = {"pairs": str(finetune), "count": len(pairs)}
    if report is not None:
        title = f"{data.parent.name or data.stem} on {run.lm.name}, {questions} questions"
        pictures = _pictures(run.lm, items, compared)
        sweep_page(report, document, records, title, COLUMNS, LEGEND, items="questions", pictures=pictures)
        document["report"] = str(report)
    left = [f"left out, as their answers aren't A and B: {', '.join(left_out)}", ""] if left_out else []
    finish(
        document,
        f"A or B on {run.lm.name}: {questions} questions of {data}",
        f"p(matching): {document['polarity']}. mass: p(A) + p(B), which should not be small",
        "",
        *left,
        scores_table(document, COLUMNS),
        out=out,
        json=json,
    )


def _pictures(lm: LM, items: list[ABItem], arms: dict[str, Arm]) -> list[Picture]:
    """Plots of the cosines between a file's vectors, and of the answers' activations at its layers."""
    from trimtab.files.load import load as load_steering
    from trimtab.methods.caa import activations
    from trimtab.report.page import Picture
    from trimtab.report.sweep import draw_planes, draw_similarity, similarity
    from trimtab.text.pairs import Pair

    pictures = []
    files = dict.fromkeys(arm.about["file"] for arm in arms.values() if arm.about["kind"] == "steered")
    for file in files:
        steering = load_steering(file)
        if len(steering.layers) == len(steering.edits) > 1:
            title = f"vectors of {Path(file).stem}, layer by layer"
            pictures.append(Picture(draw_similarity(*similarity(steering), title), f"cosines between the {title}"))
    layers = sorted({layer for arm in arms.values() if arm.steering is not None for layer in arm.steering.layers})
    layers = (
        [layers[i * len(layers) // DRAWN_LAYERS] for i in range(DRAWN_LAYERS)] if len(layers) > DRAWN_LAYERS else layers
    )
    if layers and len(items) > 2:
        drawn_items = items[:DRAWN_PAIRS]
        pairs = [Pair(f"({item.matching})", f"({item.other})", item.question, "letters") for item in drawn_items]
        letters = [(item.matching, item.other) for item in drawn_items]
        title = "activations at the answers' letters, two principal components"
        picture = draw_planes(activations(lm, pairs, layers), letters, title)
        pictures.append(Picture(picture, f"{title}; colour: side, marker: letter"))
    return pictures
