"""`trimtab make`: make a steering from one sentence, and measure what it is worth."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.commands.for_program import ForOption, check_output, commands_for, next_steps, save_for
from trimtab.commands.model import JsonOption, ModelOptions
from trimtab.commands.options import grouped
from trimtab.commands.pair_files import ColumnOptions, load_pairs
from trimtab.commands.prompts import gather_prompts
from trimtab.commands.terminal import note, progress_bar, shortened, show, write_json
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.evaluate.judge import Endpoint
    from trimtab.lm import LM
    from trimtab.making import Idea, Made

EXIT_NOTHING_BETTER = 3
LEAST_QUESTIONS = 15
"""The minimum: every second question is for testing, which leaves the eight that an idea needs to learn from."""
SELF, WRITER_KEY, WRITER_MAX_TOKENS = "self", "TRIMTAB_WRITER_KEY", 4096
WRITER_SETTINGS = ("--writer", "--writer-model", WRITER_KEY)
SHOWN, EXAMPLE = 2, 240
"""The number of examples to show, and the maximum number of characters of each text."""
WANTED, HOW = "What is wanted", "How it is made"


@grouped
def make(
    *,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write; with --for llama.cpp it may be a .gguf.")],
    idea: Annotated[
        str | None,
        typer.Argument(help="A sentence. Its opposite may follow after 'not': \"be blunt, not flattering\"."),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="Instead of a sentence: a persona that the model should be like.",
            metavar='"a pirate"',
            rich_help_panel=WANTED,
        ),
    ] = None,
    unlike: Annotated[
        str | None,
        typer.Option(
            help="With --like: a persona that it should be unlike. Default: an ordinary assistant.",
            metavar='"an office clerk"',
            rich_help_panel=WANTED,
        ),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Instead of a sentence: your own pairs, in a .jsonl, .json, .csv, .tsv or .parquet file with positive "
            "and negative, chosen and rejected, question and two letters, or another shape of https://trimtab.github.io/trimtab/pairs/",
            metavar="PAIRS",
            rich_help_panel=WANTED,
        ),
    ] = None,
    column_options: ColumnOptions,
    questions: Annotated[
        str | None,
        typer.Option(
            help="A file of questions, one per line or JSON lines with prompt; every second one is used for "
            "testing. Default: those of the trait card, or general ones.",
            metavar="FILE",
            rich_help_panel=WANTED,
        ),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(
            help="A trait card of your own, or a trait file of persona vectors, a .json file"
            " (https://trimtab.github.io/trimtab/traits/).",
            rich_help_panel=WANTED,
        ),
    ] = None,
    cards: Annotated[
        bool,
        typer.Option(
            "--cards/--no-cards",
            help="Whether one of the included trait cards may be used, if the sentence names it.",
            rich_help_panel=WANTED,
        ),
    ] = True,
    writer: Annotated[
        str | None,
        typer.Option(
            help="Who writes the system prompts and the questions: self, the model itself, which a small one may not "
            "manage; or the address of a server with OpenAI's chat completions API. Its key, if it needs one, is read "
            "from $TRIMTAB_WRITER_KEY. Needs trimtab\\[judge].",
            metavar="self|URL",
            rich_help_panel=WANTED,
        ),
    ] = None,
    writer_model: Annotated[
        str | None,
        typer.Option(help="With --writer URL: the model's name there.", metavar="NAME", rich_help_panel=WANTED),
    ] = None,
    distill: Annotated[
        bool,
        typer.Option(
            "--distill/--no-distill",
            help="Whether to train a vector too (by distillation, or, for pairs without their own prompts, by "
            "preference): it captures more and takes longest.",
            rich_help_panel=HOW,
        ),
    ] = True,
    tokens: Annotated[
        int, typer.Option(min=8, help="The maximum length of an answer, in tokens.", rich_help_panel=HOW)
    ] = 64,
    seed: Annotated[int, typer.Option(help="The random seed for the order of answers.", rich_help_panel=HOW)] = 0,
    for_: ForOption = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Write the file even if the verdict is none.", rich_help_panel=HOW)
    ] = False,
    loader: ModelOptions,
    json: JsonOption = False,
) -> None:
    """Make a steering from one sentence, and give a verdict on it.

    [bold]  trimtab make "be blunt, not flattering" --out blunt.safetensors
      trimtab make "talk like a pirate" --out pirate.safetensors
      trimtab make --like "a tired poet" --unlike "an office clerk" --out poet.safetensors
      trimtab make --from pairs.jsonl --out mine.safetensors
      trimtab make "talk like a pirate" --for llama.cpp --out pirate.gguf[/bold]

    The model answers questions under system prompts for and against the idea; forty
    traits with their prompts are included. Several ways of learning from the answers
    are tried, and the best one is chosen on held-out questions. Further questions give
    the verdict: the steering's effect as a share of the system prompt's, compared with
    random directions, and its cost. For pairs without system prompts, the effect is in
    nats per token instead.

    If no steering works, the verdict is none, no file is written, and the exit code is
    3. Takes a few minutes for a small model on two cores.
    """
    check_output(for_, out)
    _check_description({"a sentence": idea, "--like": like, "--card": card, "--from": from_}, unlike)
    columns = column_options.to_columns(pairs=from_ is not None, source="--from")
    options = {"--unlike": unlike, "--questions": questions, "--writer": writer, "--writer-model": writer_model}
    if from_ is not None and (more := [name for name, value in options.items() if value is not None]):
        raise TrimtabError(f"--from contains everything to learn from and to test on; leave out {more[0]}")
    pairs = load_pairs(from_, columns)
    if card is not None and writer is not None:
        raise TrimtabError("a card already contains what a writer would write; leave out --card or --writer")
    endpoint = _endpoint(writer, writer_model)
    question_list = None if questions is None else _questions(questions)
    parsed_idea = None if from_ or writer == SELF else _idea(idea, like, unlike, card, endpoint, cards=cards)

    from trimtab.making import make as made_from
    from trimtab.making import make_from_pairs
    from trimtab.making.idea import with_questions
    from trimtab.steering import Positions

    lm = loader.load(quiet=json)
    if writer == SELF:
        note("the model writes the system prompts and the questions …", quiet=json)
        parsed_idea = _idea(idea, like, unlike, card, lm, cards=cards)
    if parsed_idea is not None and question_list is not None:
        parsed_idea = with_questions(parsed_idea, question_list)
    source_line = (
        f"{parsed_idea.name}: from {source_of(parsed_idea)}" if parsed_idea else f"{from_}: {len(pairs)} pairs"
    )
    note(source_line, quiet=json)
    with progress_bar("answering", quiet=json, lines=False) as progress:
        how: dict[str, Any] = {
            "tokens": tokens,
            "distill": distill,
            "seed": seed,
            "stage": stage_reporter(progress, quiet=json),
            "say": lambda words: note(words, quiet=json or progress is not None),
            **({} if for_ is None else {"positions": Positions.all()}),
        }
        if parsed_idea is not None:
            made_steering = made_from(lm, parsed_idea, **how)
        else:
            made_steering = make_from_pairs(lm, pairs, name=Path(str(from_)).stem, **how)
    should_write = made_steering.verdict.holds or keep
    digest = save_for(for_, made_steering.steering, out)[1] if should_write else None
    if json:
        commands = commands_for(for_, out, 1.0) if should_write else []
        write_json(_document(lm.name, made_steering, out if should_write else None, digest, commands))
    else:
        show(*summary(made_steering), "", f"saved {out}" if should_write else "nothing is written")
        if should_write:
            show(*next_steps(for_, out, 1.0))
            if out.suffix != ".gguf":
                note(f"try: trimtab chat {loader.model_argument}--steer {quote(str(out))}", quiet=False)
        else:
            tip = "other or more pairs" if from_ else "clearer words, an opposite (--unlike)"
            note(f"try: {tip}, a larger model, or --keep to look at it", quiet=False)
    if not made_steering.verdict.holds:
        raise typer.Exit(EXIT_NOTHING_BETTER)


def _check_description(descriptions: dict[str, Any], unlike: str | None) -> None:
    """Raise `TrimtabError` unless the steering is described in exactly one way, and not by an empty text."""
    used = [name for name, way in descriptions.items() if way is not None]
    if len(used) > 1:
        raise TrimtabError(f"{used[0]} and {used[1]} both say what is wanted; give one of them")
    if unlike is not None and used not in (["--like"], ["--from"]):  # other options with --from are checked below
        raise TrimtabError('--unlike goes with --like; in a sentence the opposite follows after "not"')
    if not used or not str(descriptions[used[0]]).strip():
        raise TrimtabError(
            'describe what you want: a sentence such as "be blunt, not flattering", or --like "a pirate", '
            "or --card FILE, or --from PAIRS"
        )


def _endpoint(url: str | None, model: str | None) -> Endpoint | None:
    """The server that writes; `None` if there is none."""
    if url == SELF:
        if model is not None:
            raise TrimtabError(f"--writer {SELF} is the model of --model; leave out --writer-model")
        return None
    if (url is None) != (model is None):
        raise TrimtabError(
            f"--writer and --writer-model go together: the address of a server, and the model's name there; --writer"
            f" {SELF} needs no --writer-model"
        )
    if url is None or model is None:
        return None
    from trimtab.evaluate.judge import Endpoint

    key = os.environ.get(WRITER_KEY) or None
    endpoint = Endpoint(url, model, key, max_tokens=WRITER_MAX_TOKENS, role="writer", settings=WRITER_SETTINGS)
    endpoint.check()
    return endpoint


def _idea(
    idea: str | None,
    like: str | None,
    unlike: str | None,
    card: Path | None,
    writer: Endpoint | LM | None,
    *,
    cards: bool,
) -> Idea:
    from trimtab.data import read_trait
    from trimtab.making import idea_from_contrast, idea_from_sentence, idea_from_writer
    from trimtab.making.idea import idea_from_trait

    if card is not None:
        return idea_from_trait(read_trait(card))
    if writer is not None:
        wish = idea if idea is not None else f"be like {like}" + (f", not like {unlike}" if unlike else "")
        return idea_from_writer(writer, wish)
    return idea_from_sentence(idea, cards=cards) if idea is not None else idea_from_contrast(str(like), unlike)


def _questions(source: str) -> list[str]:
    """The questions of a file, each once."""
    prompts = gather_prompts([], source)
    questions = list(dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str)))
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise TrimtabError(f"{source}: questions are texts, not conversations")
    if len(questions) < LEAST_QUESTIONS:
        raise TrimtabError(
            f"{source}: {len(questions)} questions, and at least {LEAST_QUESTIONS} are needed, since every"
            " second one is kept for the test"
        )
    return questions


def source_of(idea: Idea) -> str:
    """A description of where an idea comes from."""
    kind, _, name = idea.source.partition(" ")
    where = {"trait": f"the trait card {name!r}", "writer": "what the writer wrote"}.get(kind, f"your {kind}")
    return f"{where}, {len(idea.learn)} questions to learn from and {len(idea.test)} to test"


def stage_reporter(progress: Callable[..., None] | None, *, quiet: bool) -> Callable[[str, int, int], None]:
    """Report stages on the bar; or, without a terminal, as a line at the start and at each quarter of a stage."""
    reached: dict[str, int] = {}

    def stage(what: str, done: int, total: int) -> None:
        quarter = 4 * done // max(total, 1)
        if progress is not None:
            progress(done, total, label=what)
        elif what not in reached:
            reached[what] = quarter
            note(f"{what} …", quiet=quiet)
        elif reached[what] < quarter < 4:
            reached[what] = quarter
            note(f"{what}: {done} of {total}", quiet=quiet)

    return stage


def summary(made_steering: Made) -> list[str]:
    """The verdict on a steering that was made, as lines, with example answers."""
    lines = [*made_steering.verdict.lines(), f"chosen: {made_steering.name}"]
    for example in made_steering.examples[:SHOWN]:
        lines += [
            "",
            f"> {shortened(example.question, EXAMPLE)}",
            f"unsteered: {shortened(example.unsteered, EXAMPLE)}",
        ]
        lines += [f"prompted:  {shortened(example.prompted, EXAMPLE)}"] if example.prompted is not None else []
        lines += [f"steered:   {shortened(example.steered, EXAMPLE)}"]
    return lines


def _document(
    model: str, made_steering: Made, out: Path | None, digest: str | None, following: list[str]
) -> dict[str, Any]:
    return {
        "file": None if out is None else str(out),
        "digest": digest,
        "model": model,
        "idea": made_steering.idea,
        "source": made_steering.source,
        "chosen": made_steering.name,
        "verdict": {**made_steering.verdict.as_measured(), "why_not": made_steering.verdict.why_not},
        "candidates": [
            {"name": candidate.name, "likelihood": candidate.likelihood, "lead": candidate.lead}
            for candidate in made_steering.candidates
        ],
        "examples": [asdict(example) for example in made_steering.examples],
        "next": following,
    }
