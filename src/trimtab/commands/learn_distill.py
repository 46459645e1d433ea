"""`trimtab learn distill`: distill a prompt into a steering."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.commands.checkers import checker_for
from trimtab.commands.for_program import ForOption, commands_for, next_steps, options_for_program, save_for, scale_for
from trimtab.commands.instructions import base_queries
from trimtab.commands.model import JsonOption, ModelOptions
from trimtab.commands.options import grouped, standalone_command
from trimtab.commands.prompts import ColumnOption, gather_prompts
from trimtab.commands.terminal import note, progress_bar, show, write_json
from trimtab.errors import TrimtabError
from trimtab.text.examples import read_examples
from trimtab.text.text_files import read_text

if TYPE_CHECKING:
    from trimtab.data import Recognised
    from trimtab.learn.own_answers import Check
    from trimtab.steering import Steering

PROMPT, CHECK, FIT = "The prompt to distill", "Which answers count", "The fit"
HELP_PHRASES = {
    "said in other ways": "with other wordings",
    "tried at several blocks": "with steering tried at several layers",
}
"""Phrases for a sentence, by the card's names for the ways of finding answers."""


@grouped
def learn_distill(
    *,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    instruction: Annotated[
        str | None,
        typer.Option(
            help="A sentence to append to each query. If its type is recognized, other phrasings are used too, and the"
            " type's own check decides which answers count.",
            metavar="SENTENCE",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.", rich_help_panel=PROMPT)] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="A text to put in front of each query; or, if it contains {query}, around it.", rich_help_panel=PROMPT
        ),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl, .json, .csv, .tsv or .parquet file of rows with prompt and answer, which become earlier"
            " turns of the conversation.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    times: Annotated[
        int, typer.Option(min=1, help="How many times the instruction is stated in the prompt.", rich_help_panel=PROMPT)
    ] = 1,
    queries: Annotated[
        str | None,
        typer.Option(
            help="A file of queries to learn on: one per line; or .jsonl, .json, .csv, .tsv or .parquet; - reads "
            "standard input. Default: the 64 included ones, which don't mention the form of an answer.",
            metavar="FILE",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    column: ColumnOption = None,
    limit: Annotated[
        int | None, typer.Option(min=8, help="Learn on at most this many queries.", rich_help_panel=PROMPT)
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(
            help="json, title, german, bullets, sentence, capitals, or a function of yours that takes the answer (and,"
            " by name, prompt and cut). Without a check, answers count that are clearly more likely with the prompt"
            " than without it.",
            metavar="NAME|MODULE:FUNCTION",
            rich_help_panel=CHECK,
        ),
    ] = None,
    type_: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Instead of --check: an IFEval type such as change_case:english_lowercase",
            rich_help_panel=CHECK,
        ),
    ] = None,
    kwargs: Annotated[str | None, typer.Option(help="The type's settings, as JSON.", rich_help_panel=CHECK)] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="The maximum length of an answer, in tokens.", rich_help_panel=CHECK)
    ] = 64,
    fit: Annotated[
        str,
        typer.Option(
            help="gradient (gradient descent on the divergence from the model with the prompt), closed (regression,"
            " block by block, without a gradient), or both, one on top of the other.",
            metavar="gradient|closed|both",
            rich_help_panel=FIT,
        ),
    ] = "gradient",
    layers: Annotated[
        str | None,
        typer.Option(
            help="Blocks to steer after, from 0: 14, or 12,14,16, or all. Default: all; for closed, every second one.",
            rich_help_panel=FIT,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The number of directions read at each block; 0 learns only a vector. Default: 8, and 64 for closed.",
            rich_help_panel=FIT,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="The maximum number of gradient steps.", rich_help_panel=FIT)] = 16,
    rate: Annotated[
        float,
        typer.Option(help="The learning rate, in units of the activations' root mean square.", rich_help_panel=FIT),
    ] = 0.005,
    with_prompt: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="The share of answers that are learned with the prompt kept, so that the steering also helps where the"
            " instruction is given.",
            rich_help_panel=FIT,
        ),
    ] = 0.3,
    seed: Annotated[int, typer.Option(help="The random seed for the order of the answers.", rich_help_panel=FIT)] = 0,
    program: ForOption = None,
    loader: ModelOptions,
    json: JsonOption = False,
) -> None:
    """Learn a steering that replaces a prompt: the model answers without the prompt as it does with it.

    [bold]  trimtab learn distill --instruction "Answer in JSON." --out json.safetensors
      trimtab learn distill --system "You are a pirate." --out pirate.safetensors
      trimtab learn distill --prompt-file style.txt --check checks.py:is_polite \\
        --out style.safetensors
      trimtab learn distill --examples shots.jsonl --out shots.safetensors[/bold]

    The model answers some queries with the prompt. Answers that follow it are kept; if
    there are too few, the model gets help: other wordings, or steering by the mean
    difference while it answers.
    Then an edit at every block is trained so that the model gives the same answers
    without the prompt. Some queries are held out to decide when to stop. This takes a
    few minutes for a small model on two cores.

    Ctrl-C during training stops it and saves the best steering so far.
    """
    from trimtab.commands.learn import parse_layers
    from trimtab.commands.learn_method import document_of

    requested_layers = parse_layers(layers)
    implied = options_for_program(program, "distill", {"fit": fit, "rank": rank}, requested_layers, out)
    rank = implied.get("rank", rank)
    _check_prompt(instruction, system, prompt_file, examples)
    all_queries = (
        gather_prompts([], queries, column) if queries is not None or column is not None else base_queries(None)
    )
    texts = [query for query in all_queries if isinstance(query, str)]
    if len(texts) < len(all_queries):
        raise TrimtabError(f"{queries}: queries to learn on are texts, not conversations")
    base = list(dict.fromkeys(texts))[:limit]
    recognised = _recognised(instruction)
    answer_check = _check(instruction, recognised, check, type_, kwargs, base)
    text = read_text(prompt_file) if prompt_file is not None else None
    shots = tuple(read_examples(examples)) if examples is not None else ()

    from trimtab.learn.own_answers import MAX_PER_QUERY, MIN_ANSWERS
    from trimtab.learn.teachers import Teacher
    from trimtab.methods.distill import learn_distill as learn

    if len(base) * MAX_PER_QUERY < MIN_ANSWERS:
        raise TrimtabError(
            f"{queries}: {len(base)} different queries, and at most {MAX_PER_QUERY} answers to each are learned from,"
            f" but {MIN_ANSWERS} answers are needed; give at least {MIN_ANSWERS // MAX_PER_QUERY}, preferably dozens"
        )
    teacher = Teacher(_phrasings(instruction, recognised), system, text, shots, times)
    lm = loader.load(quiet=json)
    chosen_layers = list(range(lm.layout.layers)) if isinstance(requested_layers, str) else requested_layers
    if recognised is not None:
        note(f"recognized as {recognised.type.name}", quiet=json)
    with progress_bar("answering", quiet=json) as progress:

        def say(words: str) -> None:
            if progress is not None:
                progress(label=words)
            else:
                note(words, quiet=json)

        learned = learn(
            lm,
            chosen_layers,
            teacher=teacher,
            queries=base,
            check=answer_check,
            fit=fit,
            rank=rank,
            steps=steps,
            rate=rate,
            tokens=tokens,
            with_prompt=with_prompt,
            seed=seed,
            progress=progress,
            say=say,
        )
    learned, digest = save_for(program, learned, out)
    if json:
        document = document_of("distill", lm.name, learned, out, digest)
        write_json(document | ({"next": commands_for(program, out, scale_for(learned))} if program else {}))
        return
    show(*_lines(lm.name, learned, out), *next_steps(program, out, scale_for(learned)))
    note(f'try: trimtab generate {loader.model_argument}--steer {quote(str(out))} --prompt "…" --compare', quiet=False)


def command() -> Any:
    """The command of this method."""
    return standalone_command("distill", learn_distill)


def _check_prompt(instruction: str | None, system: str | None, prompt_file: Path | None, examples: Path | None) -> None:
    """Raise `TrimtabError` if there is no prompt, or an empty one."""
    if all(part is None for part in (instruction, system, prompt_file, examples)):
        raise TrimtabError(
            'there is no prompt to learn from; give --instruction "Answer in JSON.", --system TEXT, --prompt-file FILE'
            " or --examples FILE"
        )
    for name, text in (("--instruction", instruction), ("--system", system)):
        if text is not None and not text.strip():
            raise TrimtabError(f"{name} is empty; write what the model is to do")


def _recognised(instruction: str | None) -> Recognised | None:
    if instruction is None:
        return None
    from trimtab.data import recognise

    return recognise(" ".join(instruction.split()))


def _phrasings(instruction: str | None, recognised: Recognised | None) -> tuple[str, ...]:
    if instruction is None:
        return ()
    others = recognised.type.phrasings("learn", recognised.values) if recognised is not None else []
    return tuple(dict.fromkeys([" ".join(instruction.split()), *others]))


def _check(
    instruction: str | None,
    recognised: Recognised | None,
    check: str | None,
    type_: str | None,
    kwargs: str | None,
    queries: list[Any],
) -> Check | None:
    """The requested check, or that of the instruction's type; `None` if there is neither."""
    if check is None and type_ is None and kwargs is None:
        if instruction is None or recognised is None:
            return None
        check, type_, kwargs = _check_of(instruction, recognised)
    checker = checker_for(check, type_, kwargs, queries)
    numbers = {query: i for i, query in enumerate(queries)}

    def judge(query: str, answer: str, cut: bool) -> bool:
        return bool(checker(numbers[query], answer, cut))

    return judge


def _check_of(instruction: str, recognised: Recognised) -> tuple[str | None, str | None, str | None]:
    """The check of a recognized instruction; preferably one that knows whether an answer was cut off."""
    from trimtab.commands.tune_task import check_of
    from trimtab.data.types import ALIASES
    from trimtab.evaluate.constraints import CONSTRAINTS

    for name, (type_, values) in ALIASES.items():
        if name in CONSTRAINTS and type_ == recognised.type.name and values == recognised.values:
            return name, None, None
    return check_of(instruction)


def _help_phrase(help_: str) -> str:
    """What helped the model to find answers, as the end of a sentence; empty if nothing did."""
    return HELP_PHRASES.get(help_, f"with steering of strength {help_}") if help_ else ""


def _lines(model: str, learned: Steering, out: Path) -> list[str]:
    measured = learned.card.measured
    tried = ", ".join(
        f"{attempt['kept']} of {attempt['asked']} {_help_phrase(attempt['help'])}".rstrip()
        for attempt in measured["tries"]
    )
    before, after = measured["divergence_before"], measured["divergence_after"]
    lines = [
        f"distill on {model}, learned from {measured['answers']} of its own answers",
        f"answers that follow the prompt: {tried}",
        f"divergence from the model with the prompt, on held-out queries: {before:.3f} without steering,"
        f" {after:.3f} steered (nats per token)",
        f"{len(learned.edits)} edits, the largest dose {max(measured['doses'].values()):.1%}",
    ]
    if measured.get("interrupted"):
        lines.append(f"interrupted after {measured.get('steps', 0)} steps; this is the best so far")
    return [*lines, f"saved {out}"]
