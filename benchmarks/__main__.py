"""`python -m benchmarks NAME`: run one benchmark."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.harness import Report
from benchmarks.report import markdown, show
from benchmarks.results import results

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("TRIMTAB_DATA") or ROOT.parent / "shared" / "data")

ALL_FOUR = "json,title,bullets,sentence"

app = typer.Typer(
    help="Ratios measured side by side, in interleaved runs. See benchmarks/RESULTS.md.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
peaks = typer.Typer(help="The peak memory of one case, for the benchmarks' own use.")
app.add_typer(peaks, name="peak", hidden=True)
app.command()(results)

Json = Annotated[Path | None, typer.Option("--json", help="Write the results to this file as JSON.")]
Check = Annotated[bool, typer.Option("--check", help="Exit with status 1 when a target is missed.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the table in the format of RESULTS.md.")]
Rounds = Annotated[int, typer.Option(min=1, help="Measured interleaved rounds.")]


@app.command()
def static(
    rounds: Rounds = 15,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per request.")] = 32,
    only: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """Steered against unsteered generation: throughput and peak memory."""
    from benchmarks.static import run

    finish(run(rounds, tokens, only), json_file, check, as_markdown)


@app.command()
def joins(rounds: Rounds = 30, json_file: Json = None, check: Check = False, as_markdown: Markdown = False) -> None:
    """What it costs a running batch of 32 when a steered request joins or leaves."""
    from benchmarks.joins import run

    finish(run(rounds), json_file, check, as_markdown)


@app.command()
def extract(
    rounds: Rounds = 3,
    pairs: Annotated[int, typer.Option(min=1, help="Contrastive pairs.")] = 300,
    data: Annotated[Path, typer.Option(help="The folder of data sets.", show_default="$TRIMTAB_DATA")] = DATA,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory on 10 times the pairs.")] = True,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """Learning a direction: pairs per second against steering-vectors and repeng, and peak memory."""
    from benchmarks.extract import DATASET, run

    file = data / DATASET
    if not file.is_file():
        Console(stderr=True).print(f"skipped: there is no {file}; name the folder of data sets with --data")
        return
    finish(run(file, pairs, rounds, memory=memory), json_file, check, as_markdown)


@app.command()
def instruct(
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to search on.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per answer.")] = 32,
    layers: Annotated[int | None, typer.Option(min=1, help="Let the reference search only this many layers.")] = None,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """The search for a layer: the paper's code against `tune`."""
    from benchmarks.instruct import run

    finish(run(prompts, tokens, layers), json_file, check, as_markdown)


@app.command()
def distill(
    model: Annotated[str | None, typer.Option(help="A Hub id, a folder or a GGUF file.")] = None,
    names: Annotated[
        str, typer.Option("--instructions", help="Which of the built-in instructions, separated by commas.")
    ] = "json,title,bullets,sentence",
    seeds: Annotated[int, typer.Option(min=1, help="Runs per instruction, with different seeds.")] = 2,
    fits: Annotated[str, typer.Option(help="gradient, closed, both; the first has controls.")] = "gradient,closed",
    lora: Annotated[bool, typer.Option(help="Train a LoRA on the same answers, too.")] = True,
    folder: Annotated[Path, typer.Option(help="Where steerings are stored and reused.")] = Path("distilled"),
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this number of test queries.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Gradient descent only: the rank of the map.")] = None,
    dtype: Annotated[str, typer.Option(help="The model's dtype: float32 or bfloat16.")] = "float32",
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """A prompt compiled into a steering, against the prompt, the mean difference, random directions and a LoRA."""
    from benchmarks.distill import run

    report = run(
        model, names.split(","), seeds, fits.split(","), folder, lora=lora, limit=limit, rank=rank, dtype=dtype
    )
    finish(report, json_file, check, as_markdown)


@app.command()
def doses(
    prompts: Annotated[int, typer.Option(min=2, help="Queries per steering.")] = 8,
    tokens: Annotated[int, typer.Option(min=8, help="New tokens per answer.")] = 32,
    layers: Annotated[str, typer.Option(help="Numbers of layers to steer, around the middle.")] = "1,3,6,30",
    only: Annotated[str, typer.Option(help="Only steerings whose name contains this.")] = "",
    data: Annotated[Path, typer.Option(help="The folder of data sets.", show_default="$TRIMTAB_DATA")] = DATA,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """The dose at which text breaks: learned and trained vectors, over few and many layers."""
    from benchmarks.doses import run

    spreads = [int(count) for count in layers.split(",")]
    finish(run(data, prompts, tokens, spreads, only), json_file, check, as_markdown)


@app.command()
def following(
    folder: Annotated[Path, typer.Option(help="Where answers and choices are stored; a second run resumes there.")],
    model: Annotated[str | None, typer.Option(help="A model; default: the default model.")] = None,
    mode: Annotated[str, typer.Option(help="'with' or 'without' the instruction in the prompt.")] = "with",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per test answer.")] = 128,
    tune_tokens: Annotated[int, typer.Option(min=1, help="New tokens per answer in the search.")] = 48,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this number of test prompts.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="A type to neither search for nor steer; repeatable.")] = None,
    nats: Annotated[
        float | None,
        typer.Option(
            help="No search: steer each type to this divergence (nats) from the unsteered model, and compare with the"
            " search that --folder has, if any."
        ),
    ] = None,
    data: Annotated[Path, typer.Option(help="The folder of data sets.", show_default="$TRIMTAB_DATA")] = DATA,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """Instruction following (IFEval, single instructions) with tuned steerings against unsteered."""
    from benchmarks.following import DATASET, run

    file = data / DATASET
    if mode not in ("with", "without"):
        raise typer.BadParameter(f"{mode!r} is neither 'with' nor 'without'", param_hint="--mode")
    if not file.is_file():
        Console(stderr=True).print(f"skipped: there is no {file}; name the folder of data sets with --data")
        return
    measured = run(model, file, mode, folder, tokens, tune_tokens, limit, skip or (), nats)
    finish(measured, json_file, check, as_markdown)


@app.command("following-distilled")
def following_distilled(
    folder: Annotated[Path, typer.Option(help="Where steerings and answers are stored; a second run resumes there.")],
    model: Annotated[str | None, typer.Option(help="A model; default: the default model.")] = None,
    mode: Annotated[str, typer.Option(help="'with' or 'without' the instruction in the prompt.")] = "without",
    fit: Annotated[str, typer.Option(help="gradient, closed or both.")] = "gradient",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per test answer.")] = 128,
    learn_tokens: Annotated[int, typer.Option(min=1, help="New tokens per answer that is learned from.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps of gradient descent.")] = 16,
    rank: Annotated[int | None, typer.Option(min=0, help="The rank of the map; 0: a vector.")] = None,
    rate: Annotated[float, typer.Option(help="Adam's learning rate.")] = 0.005,
    one_for_all: Annotated[bool, typer.Option("--one", help="With --mode with: one steering for all types.")] = False,
    dtype: Annotated[str, typer.Option(help="The model's dtype.")] = "float32",
    seed: Annotated[int, typer.Option(help="The seed for learning; use a separate folder for each.")] = 0,
    data: Annotated[Path, typer.Option(help="The folder of data sets.", show_default="$TRIMTAB_DATA")] = DATA,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """Instruction following (IFEval, single instructions) with distilled steerings against unsteered and said twice."""
    from benchmarks.following import DATASET
    from benchmarks.following_distilled import run
    from trimtab.learn.descent import Descent

    file = data / DATASET
    if mode not in ("with", "without"):
        raise typer.BadParameter(f"{mode!r} is neither 'with' nor 'without'", param_hint="--mode")
    if one_for_all and mode != "with":
        raise typer.BadParameter("one steering for all types follows the prompt: give --mode with", param_hint="--one")
    if not file.is_file():
        Console(stderr=True).print(f"skipped: there is no {file}; name the folder of data sets with --data")
        return
    finish(
        run(
            model,
            file,
            mode,
            folder,
            tokens,
            learn_tokens,
            fit,
            Descent(steps=steps, rate=rate, seed=seed),
            dtype,
            rank,
            one_for_all=one_for_all,
        ),
        json_file,
        check,
        as_markdown,
    )


@app.command()
def traits(
    folder: Annotated[Path, typer.Option(help="Where results are stored; a second run resumes there.")],
    model: Annotated[str | None, typer.Option(help="A model; default: the default model.")] = None,
    names: Annotated[str | None, typer.Option(help="Traits, separated by commas; default: twenty of them.")] = None,
    dtype: Annotated[str, typer.Option(help="The model's dtype.")] = "float32",
    seed: Annotated[int, typer.Option(help="The seed for the order of answers and for random directions.")] = 0,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """Steerings that `make` makes from trait cards: share of the system prompt's effect, random directions, costs."""
    from benchmarks.traits import run

    finish(run(model, names.split(",") if names else None, folder, dtype, seed), json_file, check, as_markdown)


@app.command()
def words(
    folder: Annotated[Path, typer.Option(help="Where answers and choices are stored; a second run resumes there.")],
    task: Annotated[str, typer.Option(help="include, exclude, length, or both (a letter case and a word left out).")],
    model: Annotated[str | None, typer.Option(help="A model; default: the default model.")] = None,
    mode: Annotated[str, typer.Option(help="'with' or 'without' the instruction in the prompt.")] = "with",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per test answer.")] = 128,
    tune_tokens: Annotated[int, typer.Option(min=1, help="New tokens per answer in the search.")] = 48,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this number of test prompts.")] = None,
    learner: Annotated[
        str, typer.Option(help="tune (a mean difference), or without a search: distill, or logit (the word's own).")
    ] = "tune",
    fit: Annotated[str, typer.Option(help="With --learner distill: gradient, closed or both.")] = "gradient",
    from_queries: Annotated[int, typer.Option(min=8, help="With --learner distill: queries to learn from.")] = 104,
    learn_tokens: Annotated[int, typer.Option(min=1, help="With --learner distill: new tokens per answer.")] = 64,
    dtype: Annotated[str, typer.Option(help="With --learner distill or logit: the model's dtype.")] = "float32",
    data: Annotated[Path, typer.Option(help="The folder of data sets.", show_default="$TRIMTAB_DATA")] = DATA,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """Words to include or exclude, lengths, and two instructions at once, with tuned steerings against unsteered."""
    from benchmarks.words import WORDS, both, lengths
    from benchmarks.words import words as one_word
    from benchmarks.words_learned import LEARNERS, Fit
    from benchmarks.words_learned import run as with_learned

    if mode not in ("with", "without"):
        raise typer.BadParameter(f"{mode!r} is neither 'with' nor 'without'", param_hint="--mode")
    if learner not in ("tune", *LEARNERS):
        raise typer.BadParameter(f"{learner!r} isn't one of tune, {', '.join(LEARNERS)}", param_hint="--learner")
    if (learner != "tune" and task == "both") or (learner, task) == ("logit", "length"):
        raise typer.BadParameter(f"{learner} has no task {task}", param_hint="--task")
    if task not in (*WORDS, "length", "both"):
        raise typer.BadParameter(f"{task!r} isn't one of include, exclude, length and both", param_hint="--task")
    if task != "length" and not (data / "ifeval").is_dir():
        Console(stderr=True).print(f"skipped: there is no {data / 'ifeval'}; name the folder of data sets with --data")
        return
    if learner != "tune":
        how = Fit(fit, from_queries, learn_tokens)
        report = with_learned(model, data, task, mode, folder, tokens, limit, learner, how, dtype)
    elif task == "length":
        report = lengths(model, mode, folder, tokens, tune_tokens)
    elif task == "both":
        report = both(model, data, mode, folder, tokens, limit)
    else:
        report = one_word(model, data, task, mode, folder, tokens, tune_tokens, limit)
    finish(report, json_file, check, as_markdown)


@app.command("demo-settings")
def demo_settings(
    limit: Annotated[int | None, typer.Option(min=8, help="The number of queries to search and confirm on.")] = None,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """The settings that `tune` chooses for the demo's instructions on the default model."""
    from benchmarks.demo_settings import run

    finish(run(limit), json_file, check, as_markdown)


@app.command()
def directer(
    rounds: Annotated[int, typer.Option(min=1, help="Measured prompts (or batches of them).")] = 24,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens per request.")] = 64,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes; repeatable. 1 and 8 unless given.")] = None,
    naive_rounds: Annotated[int, typer.Option(min=0, help="Prompts for the naive form.")] = 4,
    data: Annotated[Path, typer.Option(help="The folder of data sets.", show_default="$TRIMTAB_DATA")] = DATA,
    bench: Annotated[bool, typer.Option(help="Also run on the bench model, if it can be built.")] = True,
    default: Annotated[bool, typer.Option(help="Run on the default model.")] = True,
    schedule: Annotated[
        list[str] | None, typer.Option(help="Only this schedule, besides unsteered and the naive form; repeatable.")
    ] = None,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """Emphasis with rejection (DIRECTER): time per token of each schedule, unsteered, and of the naive form."""
    from benchmarks.directer import PROMPTS, SCHEDULES, bench_model, run

    if unknown := sorted(set(schedule or ()) - set(SCHEDULES)):
        raise typer.BadParameter(f"{unknown[0]!r} isn't one of {', '.join(SCHEDULES)}", param_hint="--schedule")
    if not (data / PROMPTS).is_file():
        Console(stderr=True).print(f"skipped: there is no {data / PROMPTS}; name the folder of data sets with --data")
        return
    other = bench_model(data.parent / "tools" / "fetch_bench_model.sh") if bench else ""
    if bench and not other:
        Console(stderr=True).print("the bench model can't be built here; running only on the default model")
    results = run(data, rounds, tokens, batch or [1, 8], naive_rounds, other, default, schedule or SCHEDULES)
    finish(results, json_file, check, as_markdown)


@app.command("eval")
def evaluate(
    rounds: Rounds = 3,
    items: Annotated[int, typer.Option(min=1, help="Questions.")] = 20,
    model: Annotated[str | None, typer.Option(help="A model; default: the default model.")] = None,
    data: Annotated[Path, typer.Option(help="The folder of data sets.", show_default="$TRIMTAB_DATA")] = DATA,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """A/B evaluation: one batched sweep over strengths and layers against one setting and one item at a time."""
    from benchmarks.eval import DATASET, run

    if not (data / DATASET).is_dir():
        Console(stderr=True).print(f"skipped: there is no {data / DATASET}; name the folder of data sets with --data")
        return
    finish(run(data, items, rounds, model), json_file, check, as_markdown)


@app.command()
def behaviours(
    folder: Annotated[Path, typer.Option(help="Where results and figures are stored; a second run resumes there.")],
    model: Annotated[str | None, typer.Option(help="A model; default: the default model.")] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Maximum number of test questions per behaviour.")] = None,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs to learn from, per behaviour.")] = 100,
    held_out: Annotated[int, typer.Option(min=2, help="Other pairs, to choose the layer on.")] = 24,
    seeds: Annotated[int, typer.Option(min=1, help="Random directions.")] = 3,
    questions: Annotated[int, typer.Option(min=2, help="Questions from MMLU.")] = 57,
    dose: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="The dose of strength 1, a share of the activation's norm; default: the vectors' own norms."
        ),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this behaviour; repeatable.")] = None,
    learner: Annotated[str, typer.Option(help="caa, or bipo: trained at every third block.")] = "caa",
    both_orders: Annotated[
        bool, typer.Option("--both-orders", help="Use each question with its answers swapped, too.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="The model's dtype: float32 or bfloat16.")] = "float32",
    data: Annotated[Path, typer.Option(help="The folder of data sets.", show_default="$TRIMTAB_DATA")] = DATA,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """CAA or BiPO on five behaviours: A/B probability by strength, random directions, system messages, and the cost."""
    from benchmarks.behaviours import CAPABILITY, run
    from trimtab.bench.behaviours import SYSTEM

    if unknown := sorted(set(only or ()) - set(SYSTEM)):
        raise typer.BadParameter(f"no behaviour {unknown[0]!r}; known: {', '.join(SYSTEM)}", param_hint="--only")
    if not (data / "caa").is_dir() or not (data / CAPABILITY).is_file():
        Console(stderr=True).print(f"skipped: {data} has no caa or no {CAPABILITY}; name the data with --data")
        return
    if learner not in ("caa", "bipo"):
        raise typer.BadParameter(f"{learner!r} is neither caa nor bipo", param_hint="--learner")
    report = run(
        model,
        data,
        folder,
        limit,
        pairs,
        held_out,
        seeds,
        questions,
        dose,
        only or (),
        learner,
        both_orders,
        dtype,
    )
    finish(report, json_file, check, as_markdown)


@app.command()
def emphasis(
    folder: Annotated[Path, typer.Option(help="Where answers are stored; a second run resumes there.")],
    model: Annotated[str | None, typer.Option(help="A model; default: the default model.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of prompts, evenly spaced.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per answer.")] = 96,
    data: Annotated[Path, typer.Option(help="The folder of data sets.", show_default="$TRIMTAB_DATA")] = DATA,
    seka: Annotated[bool, typer.Option("--seka", help="Also measure SEKA, which is learned first.")] = False,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """IFEval with the instruction emphasized: DIRECTER, PASTA, SpotLight and InstABoost, with and without rejection."""
    from benchmarks.directer import PROMPTS, WITHOUT
    from benchmarks.emphasis import run

    if missing := [file for file in (PROMPTS, WITHOUT) if not (data / file).is_file()]:
        Console(stderr=True).print(
            f"skipped: there is no {data / missing[0]}; name the folder of data sets with --data"
        )
        return
    finish(run(model, data, folder, limit, tokens, seka), json_file, check, as_markdown)


@app.command()
def methods(
    rounds: Annotated[int, typer.Option(min=0, help="Measured interleaved rounds; 0: measure only memory.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per request.")] = 32,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch sizes; repeatable. 1 and 16 unless given.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this method (or: gate, scores); repeatable.")] = None,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, each case in a separate process.")] = True,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """Every method, and gates, against unsteered generation: time per token and peak memory."""
    from benchmarks.methods import run

    finish(run(batch or [1, 16], rounds, tokens, only or (), memory), json_file, check, as_markdown)


@app.command()
def safety(
    folder: Annotated[Path, typer.Option(help="Where answers are stored; a second run resumes there.")],
    model: Annotated[str | None, typer.Option(help="A model; default: the default model.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Test requests from AdvBench.")] = 100,
    jailbreaks: Annotated[int, typer.Option(min=0, help="Test requests from JailbreakBench.")] = 50,
    safe: Annotated[int, typer.Option(min=1, help="Safe prompts from XSTest.")] = 250,
    questions: Annotated[int, typer.Option(min=1, help="Questions from MMLU.")] = 114,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per answer.")] = 24,
    data: Annotated[Path, typer.Option(help="The folder of data sets.", show_default="$TRIMTAB_DATA")] = DATA,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """Refusal of harmful requests, over-refusal, and MMLU: ungated, gated, and under rejection."""
    from benchmarks.safety import FILES, run

    if missing := [file for file in FILES if not (data / file).is_file()]:
        Console(stderr=True).print(
            f"skipped: there is no {data / missing[0]}; name the folder of data sets with --data"
        )
        return
    finish(run(model, data, folder, limit, jailbreaks, safe, questions, tokens), json_file, check, as_markdown)


@app.command()
def sadi(
    folder: Annotated[Path, typer.Option(help="Where results are stored; a second run resumes there.")],
    model: Annotated[str | None, typer.Option(help="A model; default: the default model.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; repeatable.")] = None,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs to learn from, per task.")] = 96,
    held_out: Annotated[int, typer.Option(min=2, help="Other questions, to choose settings on.")] = 32,
    limit: Annotated[int, typer.Option(min=2, help="Test questions per task.")] = 100,
    data: Annotated[Path, typer.Option(help="The folder of data sets.", show_default="$TRIMTAB_DATA")] = DATA,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """SADI against CAA on two-option questions, both tuned on held-out questions."""
    from benchmarks.sadi import TASKS, missing, run

    tasks = task or list(TASKS)
    if unknown := [each for each in tasks if each not in TASKS]:
        raise typer.BadParameter(f"{unknown[0]!r} isn't one of {', '.join(TASKS)}", param_hint="--task")
    if files := missing(data, tasks):
        Console(stderr=True).print(f"skipped: there is no {data / files[0]}; name the folder of data sets with --data")
        return
    finish(run(model, data, folder, tasks, pairs, held_out, limit), json_file, check, as_markdown)


@app.command()
def dialogues(
    model: Annotated[str | None, typer.Option(help="A model; default: the default model.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Dialogues.")] = 4,
    turns: Annotated[int, typer.Option(min=1, help="Turns per dialogue.")] = 10,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per answer.")] = 24,
    nats: Annotated[float, typer.Option(help="The divergence of every arm, 95th percentile, in nats.")] = 1.0,
    layer: Annotated[int | None, typer.Option(help="The layer to steer; default: the middle one.")] = None,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds for the cost per token; 0 skips it.")] = 5,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """Dialogues of ten turns with and without a clean cache: drift of perplexity and trait, and cost per token."""
    from benchmarks.dialogues import run

    finish(run(model, count, turns, tokens, nats, layer, rounds), json_file, check, as_markdown)


@app.command()
def audits(
    folder: Annotated[Path, typer.Option(help="Where the audits are stored.")],
    data: Annotated[Path, typer.Option(help="The folder of data sets.", show_default="$TRIMTAB_DATA")] = DATA,
    model: Annotated[str | None, typer.Option(help="A model; default: the default model.")] = None,
    dtype: Annotated[str, typer.Option()] = "float32",
    quick: Annotated[bool, typer.Option("--quick", help="Half as many items.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """Audits of steerings of six kinds, two of which are made to raise compliance with harmful requests."""
    from benchmarks.audits import DATASET, run

    file = data / DATASET
    if not file.is_file():
        Console(stderr=True).print(f"skipped: there is no {file}; name the folder of data sets with --data")
        raise typer.Exit(2)
    finish(run(model, file, folder, dtype, quick, seed), json_file, check, as_markdown)


@peaks.command("methods")
def peak_methods(
    batch: Annotated[int, typer.Option()],
    tokens: Annotated[int, typer.Option()],
    file: Annotated[Path | None, typer.Option()] = None,
) -> None:
    from benchmarks.methods import peak

    print(json.dumps({"peak_mib": peak(file, batch, tokens)}))


@app.command()
def llamacpp(
    rounds: Rounds = 8,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per request.")] = 64,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """llama.cpp against transformers: equal texts with equal weights, and the cost of steering there."""
    from benchmarks.llamacpp import run

    finish(run(rounds, tokens), json_file, check, as_markdown)


@app.command("vllm")
def vllm_engine(
    rounds: Rounds = 5,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per request.")] = 128,
    batch: Annotated[
        list[int] | None, typer.Option(help="Batch sizes; repeatable. 1, 32 and 128 unless given.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model; default: the default model.")] = None,
    dummy: Annotated[bool, typer.Option("--dummy", help="Random weights of the model's shape.")] = False,
    options: Annotated[str, typer.Option(help="vLLM's engine arguments, as a JSON object.")] = "{}",
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """Steered generation on vLLM against the same vLLM without the plugin (run it where vLLM is installed)."""
    from benchmarks.vllm import BATCHES, run

    finish(run(rounds, tokens, batch or BATCHES, model, dummy, json.loads(options)), json_file, check, as_markdown)


@peaks.command("directer")
def peak_directer(
    data: Annotated[Path, typer.Option()],
    batch: Annotated[int, typer.Option()],
    tokens: Annotated[int, typer.Option()],
    steered: Annotated[bool, typer.Option("--steered")] = False,
) -> None:
    from benchmarks.directer import peak

    print(json.dumps({"peak_mib": peak(data, batch, tokens, steered)}))


@peaks.command("static")
def peak_static(
    case: Annotated[str, typer.Option()],
    tokens: Annotated[int, typer.Option()],
    steered: Annotated[bool, typer.Option("--steered")] = False,
) -> None:
    from benchmarks.static import peak

    print(json.dumps({"peak_mib": peak(case, tokens, steered)}))


@peaks.command("extract")
def peak_extract(file: Annotated[Path, typer.Option()], pairs: Annotated[int, typer.Option()]) -> None:
    from benchmarks.extract import peak

    print(json.dumps({"peak_mib": peak(file, pairs)}))


@app.command()
def serve(
    rounds: Rounds = 3,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per answer.")] = 48,
    clients: Annotated[
        list[int] | None, typer.Option(help="Number of concurrent clients; repeatable.", show_default="1, 8, 32")
    ] = None,
    decoding: Annotated[
        str, typer.Option(help="Among greedy, sampled and logprobs, separated by commas.")
    ] = "greedy,sampled,logprobs",
    peer: Annotated[bool, typer.Option(help="Also measure `transformers serve` if it supports the decoding.")] = True,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """The server: throughput and latency, steered against unsteered, and against `transformers serve`."""
    from benchmarks.serve import CLIENTS, DECODINGS, run

    decodings = decoding.split(",")
    if unknown := [name for name in decodings if name not in DECODINGS]:
        raise typer.BadParameter(f"{unknown[0]!r} isn't one of {', '.join(DECODINGS)}", param_hint="--decoding")
    finish(run(rounds, tokens, clients or CLIENTS, decodings, peer=peer), json_file, check, as_markdown)


@app.command()
def gaps(
    tokens: Annotated[int, typer.Option(min=512, help="Length of the long prompts.")] = 4000,
    rounds: Annotated[int, typer.Option(min=1, help="Long prompts.")] = 3,
    model: Annotated[str | None, typer.Option(help="A folder; default: the default model's.")] = None,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """The server: how long a stream stalls while another client's long prompt is prefilled."""
    from benchmarks.gaps import run

    finish(run(model, tokens, rounds), json_file, check, as_markdown)


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(min=0.05, help="Duration in minutes.")] = 15.0,
    tokens: Annotated[int, typer.Option(min=48, help="Maximum number of tokens per answer.")] = 64,
    model: Annotated[str | None, typer.Option(help="A folder; default: the default model's.")] = None,
    json_file: Json = None,
    check: Check = False,
    as_markdown: Markdown = False,
) -> None:
    """A server under mixed load: no errors, no lost requests, and stable memory."""
    from benchmarks.soak import run

    finish(run(minutes, tokens, model), json_file, check, as_markdown)


def finish(report: Report, json_file: Path | None, check: bool, as_markdown: bool) -> None:
    """Date, write, print and check a report. Exits with status 1 if `check` is set and a target is missed."""
    from benchmarks.machine import commit

    command = f"python -m benchmarks {shlex.join(_that_matter(sys.argv[1:]))}"
    today = datetime.date.today().isoformat()
    report = replace(report, date=today, commands=(command,), commit=commit())
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    if as_markdown:
        print(markdown(report))
    else:
        show(report, Console())
    if check and report.short:
        for result in report.short:
            print(f"short: {result.case}: {result.metric} is {result.value:.4g}, not {result.target}", file=sys.stderr)
        raise typer.Exit(1)


def _that_matter(arguments: list[str]) -> list[str]:
    """The arguments that change what is measured, not where the results go."""
    kept = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--json":
            next(rest, None)
        elif argument not in ("--markdown", "--check") and not argument.startswith("--json="):
            kept.append(argument)
    return kept


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
