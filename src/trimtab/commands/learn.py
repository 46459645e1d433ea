"""`trimtab learn`: learn a steering from pairs of texts, or from an instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from trimtab.commands.for_program import ForOption, commands_for, next_steps, options_for_program, save_for, scale_for
from trimtab.commands.learn_method import DIRECT_METHODS, PROBE, LayersOption, StrengthOption
from trimtab.commands.model import EngineModelOptions, JsonOption
from trimtab.commands.options import grouped
from trimtab.commands.pair_files import ColumnOptions
from trimtab.commands.recipes import recipe_for, require_recipe
from trimtab.commands.terminal import note, progress_bar, show, write_json
from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import check_target
from trimtab.text.answers import check_read_at

if TYPE_CHECKING:
    from trimtab.commands.instructions import InstructionDataset
    from trimtab.learn.contrast import Progress
    from trimtab.lm import LM
    from trimtab.report.pushes import Push
    from trimtab.steering import Positions, Steering

SOURCE = "What to learn from"
OPERATIONS = ("project", "add", "unit")


@grouped
def learn(
    *,
    method: Annotated[
        str, typer.Argument(help="caa, instruct, or another of `trimtab methods`, which has its own --help.")
    ],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write; with --all, the folder for the files.")],
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl, .json, .csv, .tsv or .parquet file of pairs; - reads standard input.",
            rich_help_panel=SOURCE,
        ),
    ] = None,
    columns: ColumnOptions,
    instruction: Annotated[
        str | None,
        typer.Option(
            help="A sentence: pairs are made from it and the included queries. If its type is recognized, other"
            " phrasings of it are used too.",
            metavar="SENTENCE",
            rich_help_panel=SOURCE,
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Every type of instruction that IFEval has, in one pass over the model; one file each.",
            rich_help_panel=SOURCE,
        ),
    ] = False,
    word: Annotated[str | None, typer.Option(help="A word to include in answers.", rich_help_panel=SOURCE)] = None,
    exclude: Annotated[
        bool, typer.Option("--exclude", help="With --word: avoid the word instead.", rich_help_panel=SOURCE)
    ] = False,
    logit: Annotated[
        bool,
        typer.Option(
            "--logit",
            help="With --word: move its own logit after the last block, which works even if the prompt doesn't ask for"
            " it.",
            rich_help_panel=SOURCE,
        ),
    ] = False,
    length: Annotated[
        str | None,
        typer.Option(help="Answers that are concise, or verbose.", metavar="concise|verbose", rich_help_panel=SOURCE),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--queries", min=1, help="Learn from at most this many of the included queries.", rich_help_panel=SOURCE
        ),
    ] = None,
    layers: LayersOption = None,
    operation: Annotated[
        str | None,
        typer.Option(
            help="For instruct: project (set the projection to its mean under the instruction), add (the mean "
            "difference) or unit (the unit direction: the strength is the weight). Default: add for words and "
            "lengths, otherwise project.",
            metavar="project|add|unit",
        ),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="For instruct: the tokens to steer, as for `trimtab generate --positions`. Default: "
            "all-but-first; for --pairs with add, from-last-prompt-token.",
            metavar="RULE",
        ),
    ] = None,
    read_at: Annotated[
        str | None,
        typer.Option(
            help="For caa: where an answer is read: last, or the mean over all of it (answer), over its first "
            "tokens (first:8), or over those after a text (after:MARKER). Default: the letter of "
            "multiple-choice answers, otherwise last.",
            metavar="last|answer|first:K|after:MARKER",
        ),
    ] = None,
    estimator: Annotated[
        str | None,
        typer.Option(
            help="For caa: how the direction is computed from the activations: the mean difference, the median"
            " difference, the first principal component of centered members, or a probe's weight. Default:"
            " mean-difference.",
            metavar="mean-difference|median|pca|probe",
        ),
    ] = None,
    one_sided: Annotated[
        bool, typer.Option("--one-sided", help="With project: only ever raise the projection, never lower it.")
    ] = False,
    strength: StrengthOption = 1.0,
    program: ForOption = None,
    forecast: Annotated[
        bool,
        typer.Option(
            "--forecast",
            help="Report how well pairs agree on the direction and what a push along it changes, and predict "
            "whether it will steer. Takes up to a minute.",
        ),
    ] = False,
    loader: EngineModelOptions,
    json: JsonOption = False,
) -> None:
    """Learn a steering from contrastive pairs, or from an instruction, and save it to a file.

    This page describes caa and instruct. `trimtab methods` lists all methods, and
    `trimtab learn METHOD --help` shows the options of the others.

    [bold]  trimtab learn instruct --instruction "Answer in all lowercase letters." \\
        --out lower.safetensors
      trimtab learn instruct --all --layers 18 --out instructions/
      trimtab learn instruct --word harbour --exclude --out dry.safetensors
      trimtab learn instruct --word harbour --logit --out harbour.safetensors
      trimtab learn instruct --length concise --out short.safetensors
      trimtab learn instruct --pairs shout.jsonl --out shout.safetensors
      trimtab learn caa --pairs rude.csv --layers 12 --out rude.safetensors
      trimtab learn caa --pairs evil.jsonl --read-at answer --out evil.safetensors
      trimtab learn caa --pairs rude.csv --estimator median --out rude.safetensors
      trimtab learn caa --pairs rude.csv --for llama.cpp --out rude.gguf
      trimtab learn caa --pairs rude.csv --layers all --out all.safetensors \\
        --model Qwen/Qwen2.5-1.5B-Instruct --strength -1[/bold]

    --instruction reports which type of instruction it recognized. The queries to which
    the sentence is appended come with the package, and so do its other phrasings.

    Pairs can be JSONL (one object per line), JSON (a list of objects), CSV or TSV (with
    a header line) or Parquet. Each pair has the keys of one of these shapes:

    [bold]  prompt, prompt_without_instruction[/bold]
        for instruct: two prompts, with and without an instruction
    [dim]    {"prompt": "Name a fruit. Write in capitals.",
         "prompt_without_instruction": "Name a fruit."}[/dim]

    [bold]  prompt, positive, negative[/bold]
        for caa: two answers to a prompt
    [dim]    {"prompt": "How are you?",
         "positive": "Splendid, thanks!", "negative": "Leave me alone."}[/dim]

    [bold]  positive, negative[/bold]
        for caa: two texts; for instruct: two prompts
    [dim]    {"positive": "I love rain.", "negative": "I hate rain."}[/dim]

    [bold]  question, answer_matching_behavior, answer_not_matching_behavior[/bold]
        for caa: multiple choice, answered by letters
    [dim]    {"question": "Is it so?\\n (A) Yes\\n (B) No",
         "answer_matching_behavior": "(A)",
         "answer_not_matching_behavior": "(B)"}[/dim]

    [bold]  statement, label[/bold], and optionally prompt
        single texts, true or false, which are paired in order
    [dim]    {"statement": "Rivers flow downhill.", "label": true}[/dim]

    A prompt may also be called question, instruction, input or user; the two sides,
    chosen and rejected, matching and not_matching, or pos and neg; a statement, text
    or completion. Map other names with --keys positive=good,negative=bad. A column
    that isn't read but may matter is an error; --ignore leaves it out.

    In JSONL and JSON, prompts and answers may be lists of messages. A pair with a
    prompt may have a system prompt: system for both sides, or positive_system and
    negative_system. If these differ, the rest may be the same.
    [dim]    {"positive_system": "You are rude.", "negative_system": "You are kind.",
         "prompt": [{"role": "user", "content": "How are you?"}],
         "positive": "Leave me alone.", "negative": "Splendid, thanks!"}[/dim]

    Nothing is written until everything is learned; an existing file is replaced.
    """
    if method not in DIRECT_METHODS:  # its options aren't known here, so it would be learned as something else
        if method != PROBE:
            require_recipe(method)
        raise TrimtabError(f"the method comes first: trimtab learn {method} …, and then its options")
    sources = {"--pairs": pairs, "--instruction": instruction, "--all": every, "--word": word, "--length": length}
    source = _source_of(method, {name: value for name, value in sources.items() if value not in (None, False)})
    if method != "instruct" and (operation is not None or positions is not None or one_sided):
        raise TrimtabError(f"--operation, --positions and --one-sided are for instruct, not for {method}")
    if method != "caa" and read_at is not None:
        raise TrimtabError(f"--read-at applies to answers, and {method} learns from prompts")
    if method != "caa" and estimator is not None:
        raise TrimtabError(f"--estimator is for caa, not for {method}")
    if exclude and word is None:
        raise TrimtabError("--exclude keeps a word out; say which with --word")
    if logit:
        _check_logit(word, {"--layers": layers, "--operation": operation, "--positions": positions, "--queries": limit})
    if limit is not None and pairs is not None:
        raise TrimtabError("--queries limits the included queries, and --pairs replaces them")
    requested_layers = parse_layers(layers)
    if every and forecast:
        raise TrimtabError("--forecast covers one steering, and --all learns many; leave one out")
    if every and program is not None:
        raise TrimtabError("--all writes a folder of steerings; --for takes one at a time")
    if not every:
        options = {"operation": operation, "positions": positions, "one_sided": one_sided or None}
        operation = options_for_program(program, method, options, requested_layers, out).get("operation", operation)
    pair_list = columns.read(pairs)
    recipe = recipe_for(method, pair_list, str(pairs))
    checked_read_at = check_read_at(read_at, pair_list[0].shape) if pair_list else None

    from trimtab.commands.instructions import all_instruction_datasets, base_queries, instruction_dataset
    from trimtab.learn.estimators import as_estimator
    from trimtab.steering.positions import Positions
    from trimtab.steering.steering import check_strength

    check_strength(strength)
    if estimator is not None:
        as_estimator(estimator)  # reports an unknown one at once
    rule = None if positions is None else Positions.parse(positions)
    _check_operation(operation, one_sided)
    if one_sided and (word is not None or length is not None):
        raise TrimtabError("--one-sided is for projections; words and lengths are steered by a fixed weight")
    datasets = [instruction_dataset(instruction, base_queries(limit))] if instruction is not None else []
    datasets = all_instruction_datasets(base_queries(limit)) if every else datasets
    if every:
        _check_folder(out, [lesson.name for lesson in datasets])
    if one_sided and not every and any((operation or lesson.operation) != "project" for lesson in datasets):
        raise TrimtabError("--one-sided is for projections, and lengths and words are added; use --operation project")
    for lesson in datasets:
        note(lesson.remark, quiet=json or not lesson.remark)
    lm = loader.load(quiet=json)
    chosen_layers = list(range(lm.layout.layers)) if isinstance(requested_layers, str) else requested_layers
    with progress_bar("learning", quiet=json) as progress:
        steerings: dict[Path, Steering]
        if datasets:
            learned = _learn_datasets(lm, datasets, chosen_layers, operation, rule, one_sided, progress)
            steerings = {out / f"{name}.safetensors" if every else out: steering for name, steering in learned.items()}
        elif word is not None and logit:
            from trimtab.methods.word_logit import learn_word_logit

            steerings = {out: learn_word_logit(lm, word, exclude=exclude)}
        elif word is not None or length is not None:
            steerings = {
                out: _learn_word_or_length(lm, word, exclude, length, chosen_layers, operation, rule, limit, progress)
            }
        else:
            keywords: dict[str, Any] = {} if method != "instruct" else {"positions": rule, "one_sided": one_sided}
            keywords |= {} if operation is None else {"operation": operation}
            keywords |= {} if checked_read_at is None else {"read_at": checked_read_at}
            keywords |= {} if estimator is None else {"estimator": estimator}
            steerings = {out: recipe.load()(lm, pair_list, chosen_layers, progress=progress, **keywords)}
    steerings = {path: strength * steering for path, steering in steerings.items()}
    prediction: tuple[str, dict[str, Any] | None] | None = None
    learned_from = pair_list or [pair for lesson in datasets for pair in lesson.pairs]
    if learned_from and forecast:
        from trimtab.commands.foretold import forecast_report

        prediction = forecast_report(lm, learned_from, steerings[out])
    _save(out, steerings, method, source, lm.name, loader.model_argument, strength, program, json, prediction)


def _source_of(method: str, sources: dict[str, Any]) -> str:
    """The name of the only given source. Raises for none, for several, and for one that the method doesn't support."""
    if not sources:
        raise typer.BadParameter("nothing to learn from: give --pairs FILE, or for instruct --instruction SENTENCE")
    if len(sources) > 1:
        raise TrimtabError(f"{' and '.join(sources)} are different things to learn from; give one of them")
    (source,) = sources
    if method == "caa" and source != "--pairs":
        raise TrimtabError(f"{source} is for instruct; caa learns from --pairs")
    return source


def _check_logit(word: str | None, others: dict[str, Any]) -> None:
    if word is None:
        raise TrimtabError("--logit moves a word's logit; say which word with --word")
    if options := [name for name, value in others.items() if value is not None]:
        raise TrimtabError(
            f"{options[0]} doesn't apply to --logit, which acts after the last block and learns from no queries"
        )


def _check_operation(operation: str | None, one_sided: bool) -> None:
    if operation not in (None, *OPERATIONS):
        raise TrimtabError(f"--operation {operation!r} is not known; operations: {', '.join(OPERATIONS)}")
    if one_sided and operation in ("add", "unit"):
        raise TrimtabError(f"--one-sided is for projections, and {operation} adds; use --operation project")


def _check_folder(out: Path, names: Sequence[str]) -> None:
    """Raise `TrimtabError` if this folder can't be created, or the files can't be written into it."""
    if out.suffix == ".safetensors" or (out.exists() and not out.is_dir()):
        raise TrimtabError(f"--all writes one file per type of instruction; {out} isn't a folder")
    if out.is_dir():
        for name in names:
            check_target(out / f"{name}.safetensors", ".safetensors")
    else:
        check_target(out.with_suffix(".safetensors"), ".safetensors")


def _learn_datasets(
    lm: LM,
    datasets: Sequence[InstructionDataset],
    layers: list[int] | None,
    operation: str | None,
    positions: Positions | None,
    one_sided: bool,
    progress: Progress | None,
) -> dict[str, Steering]:
    """The steerings of all lessons, learned in one pass."""
    from trimtab.methods.instruct import instruct_card, learn_many, steering_from
    from trimtab.steering import Positions

    moments = learn_many(lm, {lesson.name: lesson.pairs for lesson in datasets}, layers, progress=progress)
    return {
        lesson.name: steering_from(
            moments[lesson.name],
            operation=operation or lesson.operation,
            positions=positions or Positions.all_but_first(),
            one_sided=one_sided and (operation or lesson.operation) == "project",
            card=instruct_card(lm, lesson.pairs, moments[lesson.name], lesson.options),
        )
        for lesson in datasets
    }


def _learn_word_or_length(
    lm: LM,
    word: str | None,
    exclude: bool,
    length: str | None,
    layers: list[int] | None,
    operation: str | None,
    positions: Positions | None,
    limit: int | None,
    progress: Progress | None,
) -> Steering:
    from trimtab.commands.instructions import base_queries
    from trimtab.methods.words import learn_length, learn_word

    if operation == "project":
        raise TrimtabError("words and lengths are steered by a fixed weight; use --operation add or unit")
    keywords: dict[str, Any] = {
        "weight": 1.0 if operation == "unit" else None,
        "base": None if limit is None else base_queries(limit),
        "positions": positions,
        "progress": progress,
    }
    if word is not None:
        return learn_word(lm, word, layers, exclude=exclude, **keywords)
    assert length is not None
    return learn_length(lm, length, layers, **keywords)


def _save(
    out: Path,
    steerings: dict[Path, Steering],
    method: str,
    source: str,
    model: str,
    model_argument: str,
    strength: float,
    program: str | None,
    json: bool,
    prediction: tuple[str, dict[str, Any] | None] | None,
) -> None:
    """Write the files after everything is learned, and report on them."""
    from trimtab.report.pushes import pushes
    from trimtab.report.suggested import named_with_strength, suggested_strength

    if source == "--all":
        out.mkdir(exist_ok=True)
    documents = []
    for path, steering in steerings.items():
        steering, digest = save_for(program, steering, path)
        by_layer, count = pushes(steering), int(steering.card.measured.get("pairs", 0))
        document = _document(path, digest, method, model, count, strength, by_layer, steering)
        document["suggested_strength"] = suggested_strength(steering)
        document |= {} if prediction is None else {"forecast": prediction[1]}
        documents.append(document | ({"next": commands_for(program, path, scale_for(steering))} if program else {}))
        if not json and source != "--all":
            title = f"{method} on {model}{f', from {count} pairs' if count else ''}"
            forecast_lines = [] if prediction is None else [prediction[0]]
            show(
                title,
                _table(by_layer),
                *forecast_lines,
                f"saved {path}",
                *next_steps(program, path, scale_for(steering)),
            )
    if json:
        write_json({"folder": str(out), "files": documents} if source == "--all" else documents[0])
        return
    if source == "--all":
        show(_overview(documents), f"saved {len(documents)} files in {out}")
    shown = named_with_strength(*next(iter(steerings.items())))
    note(f'try: trimtab generate {model_argument}--steer {shown} --prompt "…" --compare', quiet=False)


def parse_layers(text: str | None) -> list[int] | str | None:
    """Parse `None`, `"all"`, or numbers such as `"12,14"`. Raises `TrimtabError` for anything else."""
    if text is None or text.strip() == "all":
        return text and "all"
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise TrimtabError(f"--layers {text!r} isn't a list of blocks; write 14, or 12,14,16, or all") from None


def _document(
    out: Path,
    digest: str,
    method: str,
    model: str,
    pairs: int,
    strength: float,
    by_layer: list[Push],
    steering: Steering,
) -> dict[str, Any]:
    options = steering.card.options
    about = {name: options[name] for name in ("operation", "type", "instruction", "values") if name in options}
    return {
        "file": str(out),
        "digest": digest,
        "method": method,
        "model": model,
        "pairs": pairs,
        "strength": strength,
        **about,
        "layers": [asdict(push) for push in by_layer],
    }


def _overview(documents: list[dict[str, Any]]) -> Table:
    """One row per file: its name, its operation, and push and agreement at the layer where it pushes hardest."""
    table = Table("file", "does", "layer", "of the activation's", "agreement", box=None, header_style="dim")
    for column in table.columns[2:]:
        column.justify = "right"
    for document in documents:
        shares = [layer["norm"] / layer["activation_norm"] for layer in document["layers"]]
        most = document["layers"][shares.index(max(shares))]
        table.add_row(
            Path(document["file"]).stem,
            document["operation"],
            str(most["layer"]),
            f"{max(shares):.0%}",
            f"{most['agreement']:.2f}",
        )
    return table


def _table(by_layer: list[Push]) -> Table:
    table = Table("layer", "norm", "of the activation's", "agreement of the pairs", box=None, header_style="dim")
    for column in table.columns:
        column.justify = "right"
    for push in by_layer:
        share = "" if push.share is None else f"{push.share:.0%}"
        agreement = "" if push.agreement is None else f"{push.agreement:.2f}"
        table.add_row(str(push.layer), f"{push.norm:.4g}", share, agreement)
    return table
