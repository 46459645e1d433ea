"""`trimtab tune`: which layer, how strong, at which tokens, or not at all."""

from __future__ import annotations

import difflib
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from trimtab.commands.checkers import Check, checker_for
from trimtab.commands.instructions import lesson_of
from trimtab.commands.learn import parse_layers
from trimtab.commands.model import EngineModelOptions, JsonOption
from trimtab.commands.options import grouped
from trimtab.commands.pair_files import ColumnOptions
from trimtab.commands.terminal import note, progress_bar, say, show, sigterm_interrupts, write_json
from trimtab.commands.tune_advice import advice
from trimtab.errors import TrimtabError
from trimtab.files.target import check_target
from trimtab.text.pairs import Pair, as_prompt, as_texts, sides

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.steering import Positions
    from trimtab.text.chat import Prompt
    from trimtab.tune import Guard, Tuned
    from trimtab.tune.tune import Row

SEARCH, COST = "Search", "Cost"
LEARN_SHARE = 0.5
NOTHING = 3
"""The exit code where nothing is better than not steering."""
REPEAT = "combination:repeat_prompt"  # each query has a check of its own
SHOWN = 12


@dataclass(frozen=True)
class Task:
    """What is learned from, and what is searched on: base queries, the prompts asked, and those with instruction."""

    what: str
    pairs: list[Pair]
    queries: list[str]
    asked: Sequence[Prompt]
    instructed: Sequence[Prompt]


@grouped
def tune(
    *,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.", show_default=False)],
    instruction: Annotated[
        str | None, typer.Option(help="A sentence to append to the included queries.", show_default=False)
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="Your own pairs, of prompts, answers or letters: half of them are learned from, the rest searched on.",
            show_default=False,
        ),
    ] = None,
    columns: ColumnOptions,
    check: Annotated[
        str | None,
        typer.Option(
            help="Decides whether an answer complies: json, title, german, bullets, sentence, capitals, or a "
            "function of yours that takes the answer (and, by name, prompt and cut). A known --instruction "
            "needs none.",
            metavar="NAME|MODULE:FUNCTION",
            show_default=False,
        ),
    ] = None,
    type_: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Instead of --check: an IFEval type such as change_case:english_lowercase",
            show_default=False,
        ),
    ] = None,
    kwargs: Annotated[str | None, typer.Option(help="The type's settings, as JSON.", show_default=False)] = None,
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
            show_default=False,
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
            show_default=False,
        ),
    ] = None,
    guard: Annotated[
        list[str] | None,
        typer.Option(
            help="A limit of the quality guard: perplexity=2, certainty=0.3, repeated=0.1, empty=0.05, cut=0.5;"
            " LIMIT=off for none.",
            metavar="LIMIT=NUMBER",
            rich_help_panel=SEARCH,
            show_default=False,
        ),
    ] = None,
    margin: Annotated[
        float, typer.Option(help="Steer only if it is better by more than this.", rich_help_panel=SEARCH)
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="The random seed for splitting the queries.", rich_help_panel=SEARCH)] = 0,
    limit: Annotated[
        int | None,
        typer.Option(
            min=4, help="Search and confirm on this many prompts at most.", rich_help_panel=COST, show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.", rich_help_panel=COST)] = 64,
    budget_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Generate at most this many tokens.", rich_help_panel=COST, show_default=False),
    ] = None,
    budget_minutes: Annotated[
        float | None, typer.Option(help="Search this long at most.", rich_help_panel=COST, show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at a time.", rich_help_panel=COST)] = 64,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the search into this .png. Needs matplotlib.", show_default=False)
    ] = None,
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
      trimtab tune --pairs answers.jsonl --check checks.py:is_polite \
        --out polite.safetensors
      trimtab tune --pairs letters.jsonl --out caa.safetensors[/bold]

    All candidates run together on a few prompts, the better half of them on twice as
    many, and so on (successive halving). The best one is then tested on held-out
    prompts. It is saved if it beats not steering there by more than --margin; otherwise
    the answer is "don't steer" and nothing is written.

    A setting whose answers are of lower quality than unsteered ones is never chosen,
    however many comply: too unlikely or too predictable (perplexity under the unsteered
    model), repetitive, empty or endless. --guard sets the limits.

    Pairs of multiple-choice answers are scored by the probability of the matching
    letter; they need no --check and have no guard.

    With a --check, half of the pairs of answers are learned from as by trimtab learn
    caa; the check judges the model's own answers to the prompts of the other half.

    Ctrl-C and SIGTERM end the search and keep the best so far. Without a terminal, each
    round prints a line to stderr. The file's card records the complete search: trimtab
    inspect --json shows it.

    Exit code 3: nothing was better than not steering. Suggestions for what to try next
    are printed, and no file is written.
    """
    check_target(out, ".safetensors")
    if figure is not None:
        from trimtab.report.plots import check_matplotlib

        check_target(figure, ".png")
        check_matplotlib()
    if (instruction is None) == (pairs is None):
        raise TrimtabError("give one of --instruction and --pairs: what is to be learned")
    chosen_strengths = _numbers(strengths)
    rules = _rules(positions)
    limits = _guard(guard or [])
    wanted = parse_layers(layers)
    operations = ["add", "project"] if operation == "both" else [operation]
    if operation not in ("both", "add", "project"):
        raise TrimtabError(f"--operation is add, project or both, got {operation!r}")
    if budget_minutes is not None and not (math.isfinite(budget_minutes) and budget_minutes > 0):
        raise TrimtabError(f"--budget-minutes is a number above 0, got {budget_minutes}")
    read = columns.read(pairs)
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "margin": margin,
        "seed": seed,
        "budget_seconds": None if budget_minutes is None else 60 * budget_minutes,
    }
    letters = bool(read) and read[0].shape == "letters"
    behaviour = letters or (bool(read) and read[0].shape == "answers")
    if behaviour:
        _check_behaviour(read[0].shape, operation, with_instruction)
    if letters:
        if check or type_ or kwargs or budget_tokens:
            raise TrimtabError(
                "pairs of letters are scored by the letters' probabilities, and nothing is generated;"
                " leave out --check, --type, --kwargs and --budget-tokens"
            )
        task = _letters_task(read, limit, seed, str(pairs))
        checker: Check | None = None
    else:
        task = (
            _shipped(instruction, with_instruction, limit)
            if instruction is not None
            else _answers(read, limit, seed, str(pairs))
            if behaviour
            else _own(read, with_instruction, limit, seed, str(pairs))
        )
        if instruction is not None and check is None and type_ is None and kwargs is None:
            check, type_, kwargs = check_of(instruction)
        checker = checker_for(check, type_, kwargs, task.queries)

    from trimtab.files.steering_file import save_steering
    from trimtab.tune import default_layers, grid, learn_operations, tune_letters
    from trimtab.tune import tune as search_for

    lm = loader.load(quiet=json)
    tried = list(range(lm.layout.layers)) if wanted == "all" else wanted
    tried = default_layers(lm.layout.layers) if tried is None else tried
    lines = not json and not sys.stderr.isatty()  # in place of the bars
    if lines:
        common["on_round"] = lambda one: say(str(one))
    with sigterm_interrupts():
        with progress_bar("learning", quiet=json) as progress:
            if behaviour:
                from trimtab.methods.caa import learn_caa

                learned = {"add": learn_caa(lm, task.pairs, tried, progress=progress)}  # type: ignore[arg-type]
            else:
                learned = learn_operations(lm, task.pairs, tried, operations, progress=progress)  # type: ignore[arg-type]
        if lines:
            say(f"learned from {len(task.pairs)} pairs at {len(tried)} blocks")
        candidates = grid(learned, chosen_strengths, rules)
        doubts = _doubts(task, len(candidates), seed, 1 if letters else max_new_tokens, budget_tokens)
        for doubt in [] if json else doubts:
            say(f"warning: {doubt}")
        with progress_bar(f"{len(candidates)} candidates", quiet=json) as progress:
            if letters:
                held = _held_pairs(read, task)
                found = tune_letters(lm, candidates, held, progress=progress, **common)
            else:
                assert checker is not None
                found = search_for(
                    lm,
                    candidates,
                    task.asked,
                    checker,
                    groups=task.queries,
                    contexts=task.instructed,
                    guard=limits,
                    max_new_tokens=max_new_tokens,
                    budget_tokens=budget_tokens,
                    progress=progress,
                    **common,
                )
        digest = save_steering(found.steering, out) if found.steering is not None else None
        if len(found.table) < 2:
            figure = None  # interrupted before anything was tried: nothing to draw
        if figure is not None:
            from trimtab.report.search import plot_search

            what = f"{task.what} on {lm.name}"
            plot_search(found.table, figure, what, chosen=found.setting, verdict=_verdict(found))
    advised: tuple[str, ...] = ()
    if digest is None:
        instructed = with_instruction and not behaviour
        advised = advice(found, blocks=lm.layout.layers, instruction=instruction, instructed=instructed)
    if json:
        write_json({**_document(lm, task, found, out, digest, figure), "warnings": doubts, "advice": list(advised)})
    else:
        _print(lm, task, found, loader.named, out, figure)
        show(*(f"try next: {line}" for line in advised))
    if digest is None:
        raise typer.Exit(130 if found.interrupted else NOTHING)


# ---- what is searched on ---------------------------------------------------------------------------------------


def _shipped(instruction: str, with_it: bool, limit: int | None) -> Task:
    """The package's queries: `learn` to learn from, `tune` to search and confirm on."""
    from trimtab.data import prompts, queries

    sentence = instruction.strip()
    lesson = lesson_of(sentence, queries("learn"))
    base = list(queries("tune")[:limit])
    instructed = prompts(base, [sentence])
    return Task(f'"{sentence}"', list(lesson.pairs), base, instructed if with_it else base, instructed)


def _own(read: list[Pair], with_it: bool, limit: int | None, seed: int, source: str) -> Task:
    """A file's pairs, split by the prompt without the instruction: some to learn from, the others to search on."""
    from trimtab.tune.split import split_by_query

    if read[0].shape not in ("prompts", "texts"):
        raise TrimtabError(
            f"{source} holds pairs of {read[0].shape}; tune takes pairs of prompts with and without an instruction,"
            " pairs of answers, or multiple-choice pairs"
        )
    texts = [as_texts(pair, "tune") for pair in read]
    split = split_by_query([base for _, _, base in texts], held_out=1 - LEARN_SHARE, seed=seed)
    rest = [texts[i] for i in split.held_out][:limit]
    instructed, base = [with_ for _, with_, _ in rest], [without for _, _, without in rest]
    return Task(source, [read[i] for i in split.search], base, instructed if with_it else base, instructed)


def _answers(read: list[Pair], limit: int | None, seed: int, source: str) -> Task:
    """Pairs of answers: some to learn from; to the prompts of the others, the model's own answers are checked."""
    from trimtab.tune.split import split_by_query

    prompts = [sides(pair)[0].prompt for pair in read]
    if not all(prompts):
        raise TrimtabError(f"{source} has answers without a prompt, and tune asks the prompts; give each pair one")
    queries = [prompt if isinstance(prompt, str) else prompt[-1][1] for prompt in prompts]
    split = split_by_query(queries, held_out=1 - LEARN_SHARE, seed=seed)
    rest = list({queries[i]: i for i in reversed(split.held_out)}.values())[::-1][:limit]  # each prompt once
    asked = [as_prompt(prompts[i]) for i in rest]
    return Task(source, [read[i] for i in split.search], [queries[i] for i in rest], asked, asked)


def _check_behaviour(shape: str, operation: str, with_instruction: bool) -> None:
    """Raises `TrimtabError` for options that mean nothing where two answers are learned from."""
    if operation == "project":
        raise TrimtabError(f"--operation project is for pairs of prompts; what pairs of {shape} give is added")
    if not with_instruction:
        raise TrimtabError(f"pairs of {shape} have no instruction in their prompts; leave --without-instruction out")


def _doubts(task: Task, candidates: int, seed: int, tokens_each: int, budget: int | None) -> list[str]:
    """Why the search can't end in a verdict, whatever it finds."""
    from trimtab.tune.enough import too_few, too_poor
    from trimtab.tune.halving import ladder
    from trimtab.tune.split import split_by_query
    from trimtab.tune.tune import HELD_OUT

    split = split_by_query(task.queries, held_out=HELD_OUT, seed=seed)
    held, rungs = len(split.held_out), ladder(candidates, len(split.search))
    return [why for why in (too_few(held), too_poor(candidates, rungs, held, tokens_each, budget)) if why is not None]


def _letters_task(read: list[Pair], limit: int | None, seed: int, source: str) -> Task:
    from trimtab.tune.letters import check_one_question
    from trimtab.tune.split import split_by_query

    check_one_question(read)
    asked = [str(pair.prompt) for pair in read]
    split = split_by_query(asked, held_out=1 - LEARN_SHARE, seed=seed)
    asked = [asked[i] for i in split.held_out][:limit]
    return Task(source, [read[i] for i in split.search], asked, asked, asked)


def _held_pairs(read: list[Pair], task: Task) -> list[Pair]:
    asked = set(task.queries)
    return [pair for pair in read if pair.prompt in asked]


def check_of(instruction: str) -> tuple[str | None, str | None, str | None]:
    """The check of an instruction that the package knows, to save naming it: a name, or a type and kwargs."""
    from trimtab.data import instructions, recognise
    from trimtab.evaluate.constraints import CONSTRAINTS

    phrasings = {
        text.lower(): name
        for name, one in instructions().items()
        if name in CONSTRAINTS
        for text in (*one.learn, *one.test)
    }
    close = difflib.get_close_matches(instruction.strip().lower(), phrasings, n=1, cutoff=0.9)
    if close:
        return phrasings[close[0]], None, None
    found = recognise(instruction)
    if found is None or found.type.name == REPEAT:
        return None, None, None
    return None, found.type.name, dumps(found.type.arguments(found.values))


# ---- options ---------------------------------------------------------------------------------------------------


def _numbers(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise TrimtabError(f"--strengths {text!r} isn't a list of numbers; write 0.5,1,1.5") from None
    if not all(math.isfinite(number) and number for number in found):
        raise TrimtabError(f"--strengths {text!r}: each is a finite number and not 0 (not steering is always tried)")
    return found


def _rules(text: str | None) -> list[Positions] | None:
    from trimtab.steering.grammar import parse_list

    return None if text is None else parse_list(text)


def _guard(given: Sequence[str]) -> Guard:
    from trimtab.tune import Guard

    known = asdict(Guard())
    limits: dict[str, float | None] = {}
    for one in given:
        name, _, value = one.partition("=")
        if name not in known:
            raise TrimtabError(f"--guard {one}: there is no limit {name!r}; limits: {', '.join(known)}")
        try:
            limits[name] = None if value == "off" else float(value)
        except ValueError:
            raise TrimtabError(f"--guard {one}: {value!r} isn't a number; write {name}={known[name]}") from None
    try:
        return Guard(**limits)
    except ValueError as error:
        raise TrimtabError(f"--guard: {error}") from None


# ---- what is told ----------------------------------------------------------------------------------------------


def _print(lm: LM, task: Task, found: Tuned, named: str, out: Path, figure: Path | None) -> None:
    head = (
        f"{task.what} on {lm.name}: learned from {len(task.pairs)} pairs, searched on {len(found.split.search)}"
        f" prompts, confirmed on {len(found.split.held_out)} others"
    )
    show(head, _table(found), *_beyond(found))
    if found.interrupted:
        show("interrupted: this is the best so far")
    elif found.exhausted:
        show("the budget is spent: this is the best so far")
    if found.held_out is not None:
        difference = found.held_out.difference
        show(
            f"held out: {found.held_out.steered:.2f} steered, {found.held_out.unsteered:.2f} unsteered, difference"
            f" {difference.estimate:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"
        )
    show(_verdict(found))
    if found.setting is None:
        show("nothing is written")
    else:
        show(f"saved {out}")
        note(f'try: trimtab generate {named}--steer {out} --prompt "…" --compare', quiet=False)
    if figure is not None:
        show(f"figure {figure}")


def _verdict(found: Tuned) -> str:
    return f"don't steer: {found.reason}" if found.setting is None else f"steer: {found.setting}: {found.reason}"


def _table(found: Tuned) -> Table:
    """The candidates that came furthest, the best first, below not steering."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # as narrow as it gets: 80 columns hold it
    for name in ("", "block", "strength", "n", "score", "gain", "dose", "ppl", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.header_style = "dim"
    base, rest = found.table[:1], list(found.table[1:])
    rest.sort(key=lambda row: (-row.items, bool(row.broken), -row.score, row.dose))
    for row in [*base, *rest[:SHOWN]]:
        table.add_row(*_cells(row, found), style="bold" if _is_chosen(row, found) else None)
    return table


def _cells(row: Row, found: Tuned) -> list[str]:
    one = row.setting
    perplexity = "" if row.perplexity is None else f"{row.perplexity:.3g}"
    if one is None:
        return ["don't steer", "", "", str(row.items), f"{row.score:.2f}", "", "", perplexity, ""]
    return [
        f"{one.operation} {one.positions}",
        str(one.layer),
        f"{one.strength:g}",
        str(row.items),
        f"{row.score:.2f}",
        f"{row.score - row.unsteered:+.2f}",
        f"{row.dose:.2f}",
        perplexity,
        "chosen" if _is_chosen(row, found) else "✗ guard" if row.broken else "",
    ]


def _beyond(found: Tuned) -> list[str]:
    """What the table leaves out: how many rows, and which of the guard's limits were broken."""
    hidden = len(found.table) - 1 - SHOWN
    limits = Counter(reason.split(":")[0] for row in found.table for reason in row.broken)
    broken = sum(bool(row.broken) for row in found.table)
    lines = [f"… and {hidden} more, eliminated on fewer prompts or worse"] if hidden > 0 else []
    if broken:
        named = ", ".join(f"{limit} ({count})" for limit, count in limits.most_common())
        lines.append(f"the guard forbade {broken} of {len(found.table) - 1}: {named}")
    return lines


def _is_chosen(row: Row, found: Tuned) -> bool:
    return row.setting is not None and row.setting == found.setting


def _document(lm: LM, task: Task, found: Tuned, out: Path, digest: str | None, figure: Path | None) -> dict[str, Any]:
    return {
        "model": lm.name,
        "task": task.what,
        "pairs": len(task.pairs),
        "steer": found.setting is not None,
        "setting": None if found.setting is None else asdict(found.setting),
        "reason": found.reason,
        "file": None if digest is None else str(out),
        "digest": digest,
        "figure": None if figure is None else str(figure),
        "held_out": None if found.held_out is None else asdict(found.held_out),
        "interrupted": found.interrupted,
        "exhausted": found.exhausted,
        "searched_on": len(found.split.search),
        "confirmed_on": len(found.split.held_out),
        "answers": found.answers,
        "tokens": found.tokens,
        "table": [asdict(row) for row in found.table],
    }
