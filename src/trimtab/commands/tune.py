"""`trimtab tune`: find the layer, strength and positions to steer with, or that none works."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.commands.checkers import Check, checker_for
from trimtab.commands.learn import parse_layers
from trimtab.commands.model import EngineModelOptions, JsonOption
from trimtab.commands.options import check_picture, grouped, numbers_of
from trimtab.commands.pair_files import ColumnOptions
from trimtab.commands.terminal import progress_bar, say, show, sigterm_interrupts, write_json
from trimtab.commands.tune_advice import advice
from trimtab.commands.tune_report import document, print_search, verdict
from trimtab.commands.tune_task import (
    answer_task,
    budget_warnings,
    check_behaviour,
    check_of,
    held_out_warnings,
    instruction_task,
    letter_task,
    prompt_task,
    select_search_pairs,
)
from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import check_target

if TYPE_CHECKING:
    from trimtab.steering import Positions
    from trimtab.tune import Guard

SEARCH, COST = "Search", "Cost"
EXIT_NOTHING_BETTER = 3
"""The exit code if nothing is better than not steering."""


@grouped
def tune(
    *,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    instruction: Annotated[str | None, typer.Option(help="A sentence to append to the included queries.")] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="Your own pairs, of prompts, answers or letters: half are used to learn from, the rest to search on."
        ),
    ] = None,
    columns: ColumnOptions,
    check: Annotated[
        str | None,
        typer.Option(
            help="Decides whether an answer complies: json, title, german, bullets, sentence, capitals, or a function "
            "of yours that takes the answer (and, by name, prompt and cut). A known --instruction needs none.",
            metavar="NAME|MODULE:FUNCTION",
        ),
    ] = None,
    type_: Annotated[
        str | None,
        typer.Option("--type", help="Instead of --check: an IFEval type such as change_case:english_lowercase"),
    ] = None,
    kwargs: Annotated[str | None, typer.Option(help="The type's settings, as JSON.")] = None,
    with_instruction: Annotated[
        bool,
        typer.Option(
            "--with-instruction/--without-instruction",
            help="Search with the instruction in the prompt, or without it.",
        ),
    ] = True,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Blocks to try, from 0: 12,16,20, or all. Default: about eight, from a fifth of the depth on.",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    strengths: Annotated[
        str, typer.Option(help="Multiples of the learned steering.", rich_help_panel=SEARCH)
    ] = "0.5,1,1.5",
    operation: Annotated[
        str,
        typer.Option(help="add the mean difference, project onto its mean, or both.", rich_help_panel=SEARCH),
    ] = "both",
    positions: Annotated[
        str | None,
        typer.Option(
            help="Rules to try, as in `trimtab generate`: all-but-first,from-last-prompt-token. Default: each "
            "operation's own.",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    guard: Annotated[
        list[str] | None,
        typer.Option(
            help="A limit of the quality guard: perplexity=2, certainty=0.3, repeated=0.1, empty=0.05, cut=0.5;"
            " LIMIT=off for none.",
            metavar="LIMIT=NUMBER",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    margin: Annotated[
        float,
        typer.Option(
            help="Steer only if it is better by more than this, as well as by more than chance.", rich_help_panel=SEARCH
        ),
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="The random seed for splitting the queries.", rich_help_panel=SEARCH)] = 0,
    limit: Annotated[
        int | None, typer.Option(min=4, help="Search and confirm on this many prompts at most.", rich_help_panel=COST)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.", rich_help_panel=COST)] = 64,
    budget_tokens: Annotated[
        int | None, typer.Option(min=1, help="Generate at most this many tokens.", rich_help_panel=COST)
    ] = None,
    budget_minutes: Annotated[
        float | None, typer.Option(help="Search for at most this many minutes.", rich_help_panel=COST)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at a time.", rich_help_panel=COST)] = 64,
    figure: Annotated[Path | None, typer.Option(help="Draw the search into this .png. Needs matplotlib.")] = None,
    loader: EngineModelOptions,
    json: JsonOption = False,
) -> None:
    """Find the layer, strength and positions at which a steering works, or find that none
    does.

    [bold]  trimtab tune --instruction "Answer in JSON format." --check json \\
        --out json.safetensors --figure json.png
      trimtab tune --instruction "Use small letters only." \\
        --type change_case:english_lowercase --without-instruction \\
        --out lower.safetensors --budget-minutes 10
      trimtab tune --pairs mine.jsonl --check checks.py:is_polite \\
        --layers 12,16,20 --strengths 0.5,1,2 --out polite.safetensors
      trimtab tune --pairs answers.jsonl --check checks.py:is_polite \\
        --out polite.safetensors
      trimtab tune --pairs letters.jsonl --out caa.safetensors[/bold]

    All candidates run together on a few prompts, the better half of them on twice as
    many, and so on (successive halving). The best one is then tested on held-out
    prompts. It is saved if it beats not steering there by more than chance (in an exact
    paired test, which at most 5 % of steerings that do nothing pass) and by more than
    --margin; otherwise the answer is "don't steer" and nothing is written.

    A setting that degrades the answers is never chosen, however many comply: too
    unlikely or too predictable (perplexity under the unsteered model), repetitive,
    empty or cut off at the token limit. --guard sets the limits.

    Pairs of multiple-choice answers are scored by the probability of the matching
    letter; they need no --check and have no guard.

    With a --check, pairs of answers work, too: half of them are learned from, as by
    trimtab learn caa, and the check judges the model's own answers to the prompts of
    the other half.

    Ctrl-C and SIGTERM end the search and keep the best so far, as "not confirmed" if it
    hasn't been tested on held-out prompts. Without a terminal, each round prints a line
    to stderr. The file's card records the complete search: trimtab inspect --json shows
    it.

    Exit code 3: nothing was better than not steering. Suggestions for what to try next
    are printed, and no file is written.
    """
    check_target(out, ".safetensors")
    check_picture(figure)
    if (instruction is None) == (pairs is None):
        raise TrimtabError("give one of --instruction and --pairs: what to learn from")
    chosen_strengths = _numbers(strengths)
    rules = _rules(positions)
    limits = _guard(guard or [])
    requested_layers = parse_layers(layers)
    operations = ["add", "project"] if operation == "both" else [operation]
    if operation not in ("both", "add", "project"):
        raise TrimtabError(f"--operation is add, project or both, got {operation!r}")
    if not math.isfinite(margin):
        raise TrimtabError(f"--margin is a finite number, such as 0.1, got {margin}")
    if budget_minutes is not None and not (math.isfinite(budget_minutes) and budget_minutes > 0):
        raise TrimtabError(f"--budget-minutes is a number above 0, got {budget_minutes}")
    pair_list = columns.read(pairs)
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "margin": margin,
        "seed": seed,
        "budget_seconds": None if budget_minutes is None else 60 * budget_minutes,
    }
    letters = bool(pair_list) and pair_list[0].shape == "letters"
    behaviour = letters or (bool(pair_list) and pair_list[0].shape == "answers")
    if behaviour:
        check_behaviour(pair_list[0].shape, operation, with_instruction)
    if letters:
        if check or type_ or kwargs or budget_tokens:
            raise TrimtabError(
                "pairs of letters are scored by the letters' probabilities, and nothing is generated;"
                " leave out --check, --type, --kwargs and --budget-tokens"
            )
        task = letter_task(pair_list, limit, seed, str(pairs))
        checker: Check | None = None
    else:
        task = (
            instruction_task(instruction, with_instruction, limit)
            if instruction is not None
            else answer_task(pair_list, limit, seed, str(pairs))
            if behaviour
            else prompt_task(pair_list, with_instruction, limit, seed, str(pairs))
        )
        if instruction is not None and check is None and type_ is None and kwargs is None:
            check, type_, kwargs = check_of(instruction)
        checker = checker_for(check, type_, kwargs, task.queries)
    warnings = held_out_warnings(task, seed)
    for doubt in [] if json else warnings:
        say(f"warning: {doubt}")

    from trimtab.files.steering_file import save_steering
    from trimtab.tune import default_layers, grid, learn_operations, tune_letters
    from trimtab.tune import tune as search_for

    lm = loader.load(quiet=json)
    layers_to_try = list(range(lm.layout.layers)) if requested_layers == "all" else requested_layers
    layers_to_try = default_layers(lm.layout.layers) if layers_to_try is None else layers_to_try
    learned_count = 1 if behaviour else len(operations)
    count = learned_count * len(set(layers_to_try)) * len(chosen_strengths) * (1 if rules is None else len(rules))
    over_budget = budget_warnings(task, count, seed, 1 if letters else max_new_tokens, budget_tokens)
    for doubt in [] if json else over_budget:
        say(f"warning: {doubt}")
    warnings += over_budget
    lines = not json and not sys.stderr.isatty()  # instead of progress bars
    if lines:
        common["on_round"] = lambda finished: say(str(finished))
    with sigterm_interrupts():
        with progress_bar("learning", quiet=json) as progress:
            if behaviour:
                from trimtab.methods.caa import learn_caa

                learned = {"add": learn_caa(lm, task.pairs, layers_to_try, progress=progress)}  # type: ignore[arg-type]
            else:
                learned = learn_operations(lm, task.pairs, layers_to_try, operations, progress=progress)  # type: ignore[arg-type]
        if lines:
            say(f"learned from {len(task.pairs)} pairs at {len(layers_to_try)} blocks")
        candidates = grid(learned, chosen_strengths, rules)
        with progress_bar(f"{len(candidates)} candidates", quiet=json) as progress:
            if letters:
                search_pairs = select_search_pairs(pair_list, task)
                result = tune_letters(lm, candidates, search_pairs, progress=progress, **common)
            else:
                assert checker is not None
                result = search_for(
                    lm,
                    candidates,
                    task.prompts,
                    checker,
                    groups=task.queries,
                    contexts=task.instructed,
                    guard=limits,
                    max_new_tokens=max_new_tokens,
                    budget_tokens=budget_tokens,
                    progress=progress,
                    **common,
                )
        if result.steering is not None and not result.interrupted:
            from trimtab.evaluate.divergence import with_divergence

            with suppress(KeyboardInterrupt):  # the file is then saved without it
                result = replace(result, steering=with_divergence(lm, result.steering, task.prompts))
        digest = save_steering(result.steering, out) if result.steering is not None else None
        if len(result.table) < 2:
            figure = None  # interrupted before anything was tried, so there is nothing to draw
        if figure is not None:
            from trimtab.report.search import plot_search

            what = f"{task.title} on {lm.name}"
            plot_search(result.table, figure, what, chosen=result.setting, verdict=verdict(result))
    advised: tuple[str, ...] = ()
    if digest is None:
        instructed = with_instruction and not behaviour
        advised = advice(result, blocks=lm.layout.layers, instruction=instruction, instructed=instructed)
    if json:
        doubts = [*warnings, *result.warnings]
        write_json({**document(lm, task, result, out, digest, figure), "warnings": doubts, "advice": list(advised)})
    else:
        print_search(lm, task, result, loader.model_argument, out, figure)
        show(*(f"try next: {line}" for line in advised))
    if digest is None:
        raise typer.Exit(130 if result.interrupted else EXIT_NOTHING_BETTER)


# ---- options ---------------------------------------------------------------------------------------------------


def _numbers(text: str) -> list[float]:
    numbers = numbers_of(text, "--strengths", "0.5,1,1.5")
    if not all(math.isfinite(number) and number for number in numbers):
        raise TrimtabError(f"--strengths {text!r}: each is a finite number and not 0 (not steering is always tried)")
    return numbers


def _rules(text: str | None) -> list[Positions] | None:
    from trimtab.steering.grammar import parse_list

    return None if text is None else parse_list(text)


def _guard(texts: Sequence[str]) -> Guard:
    from trimtab.tune import Guard

    known = asdict(Guard())
    limits: dict[str, float | None] = {}
    for limit in texts:
        name, _, value = limit.partition("=")
        if name not in known:
            raise TrimtabError(f"--guard {limit}: there is no limit {name!r}; limits: {', '.join(known)}")
        try:
            limits[name] = None if value == "off" else float(value)
        except ValueError:
            raise TrimtabError(f"--guard {limit}: {value!r} isn't a number; write {name}={known[name]}") from None
    try:
        return Guard(**limits)
    except ValueError as error:
        raise TrimtabError(f"--guard: {error}") from None
