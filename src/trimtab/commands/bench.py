"""`trimtab bench`: every method on one model, at equal divergence; `trimtab forecast`: a fit to its results."""

from __future__ import annotations

import json as json_module
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from trimtab.commands.model import PANEL, JsonOption, ModelOptions, ReplicasOption, check_replicas
from trimtab.commands.options import grouped, numbers_of
from trimtab.commands.terminal import note, progress_bar, show, sigterm_interrupts, write_json
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.bench import Plan, Results
    from trimtab.bench.plan import Speed

DATA = "TRIMTAB_DATA"
PAGE = "page.html"
BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(h|min|m|s)?")
SECONDS: dict[str | None, float] = {"h": 3600.0, "min": 60.0, "m": 60.0, "s": 1.0, None: 60.0}


@grouped
def bench(
    *,
    out: Annotated[
        Path,
        typer.Option(
            help="The folder for the run: a file for each part, results.json and page.html. The same command resumes an"
            " interrupted run."
        ),
    ],
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names, or patterns such as re*; several with commas; !NAME excludes one. Default: all, including "
            "installed ones.",
            metavar="NAMES",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="instructions, behaviours, refusal, traits, more-instructions, more-traits; names of tasks, or "
            "patterns. Default: the first four, as far as the data allow.",
            metavar="NAMES",
        ),
    ] = None,
    nats: Annotated[
        str, typer.Option(help="The divergences at which methods are compared.", metavar="NUMBERS")
    ] = "0.25,1,4",
    items: Annotated[int, typer.Option(min=4, help="The maximum number of items of a task.")] = 24,
    pairs: Annotated[int, typer.Option(min=8, help="The maximum number of pairs to learn from.")] = 24,
    tokens: Annotated[int, typer.Option(min=4, help="The maximum length of an answer, in tokens.")] = 48,
    seed: Annotated[int, typer.Option(help="The random seed.")] = 0,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Roughly how long it may take: 2h, 25min. Items, and then tasks, are left out to fit.", metavar="TIME"
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(envvar=DATA, help="A folder with any of caa/, ifeval/, refusal/, mmlu/ and xstest/.")
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Finetune a LoRA for each task, too.")] = False,
    thorough: Annotated[
        bool,
        typer.Option(
            "--thorough",
            help="Measure orthogonal controls and side effects at every strength, not only where there is a gain.",
        ),
    ] = False,
    mix_code: Annotated[
        bool,
        typer.Option(
            "--mix-code",
            help="Resume a run that other code of trimtab began; the results then list both.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and the expected time, and stop.")] = False,
    loader: ModelOptions,
    answers: Annotated[
        str,
        typer.Option(
            help="The engine that generates answers and scores letters: transformers or vllm. Learning and divergences "
            "stay with transformers, on --device.",
            metavar="ENGINE",
            rich_help_panel=PANEL,
        ),
    ] = "transformers",
    replicas: ReplicasOption = None,
    json: JsonOption = False,
) -> None:
    """Compare every method on one model at equal divergence, along with the prompt and random directions.

    [bold]  trimtab bench --out bench/ --budget 2h --data data/
      trimtab bench --out quick/ --tasks traits --methods caa,repe,reps --dry-run
      trimtab bench --out quick/ --tasks refusal --nats 1 --items 48 --lora[/bold]

    A method is learned with its own defaults from the task's pairs (or texts, or
    prompt), then scaled until the 95th percentile of its divergence from the unsteered
    model is 0.25, 1 and 4 nats on prompts of the task: the same push for all, whatever
    they do internally. A method of your own gets its row too, if `trimtab methods`
    lists it.

    The other arms are the unsteered model, the prompt that asks for the same, this
    prompt stated twice, and random directions at the same nats. Where a method gains
    something, directions orthogonal to its own and its side effects are measured, too
    (MMLU, harmless requests refused, the other behaviours, plain text).

    Verdicts are exact paired tests: of methods that do nothing, at most 5 % are called
    better. Methods that can't act on a task are listed with the reason.

    The instructions and the traits are included. For the rest, --data names a folder
    with third-party data (layout: https://trimtab.github.io/trimtab/bench/).
    """
    from trimtab.bench import Settings, plan
    from trimtab.bench import bench as run
    from trimtab.bench.page import write_page
    from trimtab.bench.plan import fit_to_budget, restrict_plan, speed_of

    doses = tuple(numbers_of(nats, "--nats", "0.25,1,4"))
    settings = Settings(_names(methods), _names(tasks), doses, items, pairs, tokens, seed, data, lora, thorough)
    seconds = None if budget is None else seconds_of(budget)
    if out.exists() and not out.is_dir():
        raise TrimtabError(f"--out {out} is a file; give a folder, which is created if it doesn't exist")
    bench_plan = plan(settings)
    check_replicas(replicas, answers)
    lm = loader.load(quiet=json)
    answering_lm = None
    if answers != "transformers":
        answer_loader = replace(loader, device=None, dtype=lm.runs_in["dtype"].removeprefix("torch."))
        answering_lm = answer_loader.load(quiet=json, engine=answers, replicas=replicas)
    speed = speed_of(lm, answering_lm)
    if seconds is not None:
        before = _previous_selection(out)
        bench_plan = fit_to_budget(bench_plan, speed, seconds) if before is None else restrict_plan(bench_plan, *before)
    if dry_run:
        _print_plan(bench_plan, speed, json)
        return
    note(_remaining_work(bench_plan, speed, out), quiet=json)
    for kind, why in bench_plan.left_out:
        note(f"without {kind}: {why}", quiet=json)
    with sigterm_interrupts(), progress_bar("benchmark", quiet=json) as progress:
        try:
            results = run(
                lm,
                bench_plan,
                out,
                answering=answering_lm,
                mix_code=mix_code,
                progress=progress,
                say=lambda name: note(name, quiet=json),
            )
        except KeyboardInterrupt:
            note(f"finished parts are in {out}; the same command resumes the run", quiet=json)
            raise
    write_page(out / PAGE, results)
    if json:
        write_json(results.to_json())
        return
    show(*_tables(results), *results.words(), f"page {out / PAGE}", f"results {out / 'results.json'}")


def forecast(
    runs: Annotated[list[Path], typer.Argument(help="Folders that trimtab bench wrote.")],
    write: Annotated[Path | None, typer.Option(help="Write the fit to this .json file.", metavar="FILE")] = None,
    json: JsonOption = False,
) -> None:
    """Fit and check the forecast of whether a mean difference will steer, on results of `trimtab bench`.

    [bold]  trimtab forecast bench/ other-model/
      trimtab forecast bench/ --write forecast.json[/bold]

    `trimtab learn --forecast` prints a forecast from four numbers that need no
    generated answers: how well held-out pairs agree on the direction, how well it
    separates them, how much more a push along it changes than a random one, and how
    that grows. This command fits a model that predicts from them whether the steering
    was better in the benchmarks, and reports its AUC on tasks that were each left out
    in turn (0.5 is no better than chance, 1 is always right).
    """
    from trimtab.files.atomic_write import check_target, write_atomically
    from trimtab.tune.forecast import NAMES, auc_of, fit

    if write is not None:
        check_target(write, ".json")
    cases: list[Any] = []
    sources = []
    for folder in runs:
        more, source = _cases(folder)
        cases += more
        sources.append(source)
    fitted = fit(cases)
    worked = [case.worked for case in cases]
    alone = {
        name: auc_of([case.features[n] for case in cases], [case.worked for case in cases])
        for n, name in enumerate(NAMES)
    }
    document = {**fitted, "alone": alone, "made_from": sources}
    if write is not None:
        write_atomically(write, (json_module.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    if json:
        write_json(document)
        return
    table = Table("", "weight", "AUC alone", box=None, header_style="dim")
    for name, weight in zip(NAMES, fitted["weights"], strict=True):
        table.add_row(name, f"{weight:+.2f}", f"{alone[name]:.2f}")
    show(
        table,
        f"{len(cases)} results, {sum(worked)} of which worked; AUC on tasks left out one at a time:"
        f" {fitted['auc']:.2f}",
        *([f"saved {write}"] if write else []),
    )


# ---- helpers ---------------------------------------------------------------------------------------------------


def seconds_of(text: str) -> float:
    """Parse a time such as 2h, 25min, 90s or 10 (minutes). Raises `TrimtabError` for anything else."""
    match = BUDGET.fullmatch(text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise TrimtabError(f"--budget {text!r} isn't a time; write 2h, 25min or 90s")
    return float(match[1]) * SECONDS[match[2]]


def _names(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _remaining_work(bench_plan: Plan, speed: Speed, out: Path) -> str:
    """How much there is to do, and how much of it an earlier run has done."""
    from trimtab.bench.plan import duration

    done = len(list((out / "cells").glob("*--method--*.json")))
    if done >= bench_plan.cells:
        return f"{bench_plan.cells} cells, all of them already done"
    before = f", {done} of them already done" if done else ""
    left = duration(speed.seconds(bench_plan.cost()) * (bench_plan.cells - done) / bench_plan.cells)
    return f"{bench_plan.cells} cells{before}, about {left}; Ctrl-C stops, the same command resumes"


def _previous_selection(out: Path) -> tuple[list[str], int] | None:
    """The tasks and the number of items of an earlier run in this folder, so that a budget doesn't choose again."""
    path = out / "run.json"
    if not path.is_file():
        return None
    try:
        head = json_module.loads(path.read_bytes())
        return [str(name) for name in head["tasks"]], int(head["settings"]["items"])
    except (ValueError, KeyError, TypeError):
        raise TrimtabError(f"{path} is damaged; name another folder") from None


def _print_plan(bench_plan: Plan, speed: Speed, json: bool) -> None:
    """Print the plan and the estimate."""
    from trimtab.bench.plan import duration

    cost = bench_plan.cost()
    document: dict[str, Any] = {
        "tasks": [
            {"task": outline.name, "kind": outline.kind, "items": min(bench_plan.settings.items, outline.available)}
            for outline in bench_plan.outlines
        ],
        "methods": list(bench_plan.rows),
        "nats": list(bench_plan.nats),
        "cells": bench_plan.cells,
        "generated_tokens": round(cost.generated),
        "read_tokens": round(cost.read),
        "seconds": round(speed.seconds(cost)),
        "left_out": dict(bench_plan.left_out),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    if json:
        write_json(document)
        return
    table = Table("task", "kind", "items", box=None, header_style="dim")
    for task in document["tasks"]:
        table.add_row(task["task"], task["kind"], str(task["items"]))
    show(
        table,
        f"methods: {', '.join(bench_plan.rows)}",
        f"at {', '.join(f'{number:g}' for number in bench_plan.nats)} nats; {bench_plan.cells} cells; about"
        f" {duration(speed.seconds(cost))} ({cost.generated / 1000:.0f}k tokens generated at {speed.generated:.0f} a"
        f" second, {cost.read / 1000:.0f}k read at {speed.read:.0f})",
        *(f"without {kind}: {why}" for kind, why in bench_plan.left_out),
    )


def _tables(results: Results) -> list[Any]:
    """Each method's gain on each task, and its overall standing."""
    from trimtab.bench.page import MARKS

    table = Table("method", *(task.name for task in results.tasks), "better", "place", box=None, header_style="dim")
    for column in table.columns[1:]:
        column.justify = "right"
    plain = [f"{task.unsteered:.2f}" for task in results.tasks]
    table.add_row("unsteered", *plain, "", "", style="dim")
    for arm in ("prompt", "said twice"):
        gains = [
            f"{task.prompted[arm].difference.estimate:+.2f}" if arm in task.prompted else "·" for task in results.tasks
        ]
        table.add_row(arm, *gains, "", "", style="bold")
    for standing in results.methods:
        cells = []
        for task in results.tasks:
            row = next((row for row in task.rows if row.method == standing.method), None)
            if row is None:
                cells.append("·")
                continue
            broken = "†" if row.cell.broken else ""
            cells.append(f"{row.cell.decision.difference.estimate:+.2f}{MARKS.get(row.cell.verdict, '')}{broken}")
        table.add_row(standing.method, *cells, f"{standing.better}/{standing.tasks}", f"{standing.place:.2f}")
    return [
        table,
        "gain over unsteered at the best divergence; ▲ better than unsteered and its controls, △ no control, ▼ worse, ≈"
        " as a control, † text broken, · can't act there",
    ]


def _cases(folder: Path) -> tuple[Sequence[Any], dict[str, Any]]:
    """The benchmark's rows that have predictors and a control, and their source."""
    from trimtab.bench.results import UNCONTROLLED, results_of
    from trimtab.evaluate.decision import BETTER
    from trimtab.tune.forecast import Case, Predictors

    results = results_of(folder)
    cases = [
        Case(task.name, Predictors(**row.predictors).features, row.cell.verdict == BETTER and not row.cell.broken)
        for task in results.tasks
        for row in task.rows
        if row.predictors is not None and row.cell.verdict != UNCONTROLLED
    ]
    model, settings = results.about["model"], results.about["settings"]
    source = {
        "model": model.get("name"),
        "fingerprint": model.get("fingerprint"),
        "dtype": model.get("dtype"),
        "tasks": len(results.tasks),
        "results": len(cases),
        **{name: settings[name] for name in ("items", "pairs", "tokens", "nats", "seed")},
        "versions": results.about["versions"],
    }
    return cases, source
