"""`trimtab learn METHOD` for every method with a recipe: its command is generated from the recipe."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperCommand

from trimtab.commands.for_program import ForOption, commands_for, next_steps, options_for_program, save_for, scale_for
from trimtab.commands.model import EngineModelOptions, JsonOption
from trimtab.commands.options import parameters_of, pop_group, standalone_command
from trimtab.commands.pair_files import ColumnOptions, load_pairs
from trimtab.commands.prompts import ColumnOption, gather_prompts
from trimtab.commands.recipes import check_shape, require_recipe
from trimtab.commands.terminal import note, progress_bar, show, write_json
from trimtab.errors import TrimtabError
from trimtab.methods.recipe import Option, Recipe

if TYPE_CHECKING:
    from trimtab.steering import Steering
    from trimtab.text.columns import Columns

DIRECT_METHODS = ("caa", "instruct")
"""Methods that `trimtab learn` itself handles, since they have more sources to learn from."""
PROBE = "probe"
"""It isn't a method, since it learns something to read, not to steer with. It has a command here because it learns
from pairs.
"""
DISTILL = "distill"
"""Its command is written by hand, since it learns from a prompt, in several forms, and not from data."""

METHOD = "The method's own options"
TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool}
FILES = {"pairs": "FILE", "texts": "FILE", "steering": "FILE", "positions": "RULE"}


class LearnCommand(TyperCommand):
    """`trimtab learn`, which turns into a method's own command if the method has a recipe."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the method's own command if the first argument is such a method."""
        if args and args[0] == PROBE:
            from trimtab.commands import learn_probe

            return learn_probe.command().make_context(f"{info_name} {PROBE}", args[1:], parent=parent, **extra)
        if args and args[0] not in DIRECT_METHODS and not args[0].startswith("-"):
            recipe = require_recipe(args[0])
            from trimtab.commands import learn_distill

            command = learn_distill.command() if recipe.name == DISTILL else command_for(recipe)
            return command.make_context(f"{info_name} {args[0]}", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)


def command_for(recipe: Recipe) -> Any:
    """The command of one method: the common options, and those of its recipe."""

    def run(**arguments: Any) -> None:
        _learn(recipe, arguments)

    texts = recipe.takes == "texts" or any(option.kind == "texts" for option in recipe.options)
    column = [_keyword("column", ColumnOption, None)] if texts else []
    parameters = [*_source(recipe), *column, *(_parameter(option) for option in recipe.options), *_COMMON]
    names = [parameter.name for parameter in parameters]
    if twice := [name for name in names if names.count(name) > 1]:
        raise TrimtabError(
            f"{recipe.name} of {recipe.distribution} has an option {twice[0]!r}, which every command has; rename it"
        )
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = (
        f"{recipe.title[:1].upper()}{recipe.title[1:]}: {recipe.paper}\n\n"
        f"Learns from {recipe.data}. Reads {recipe.reads}. Acts: {recipe.acts}. Costs {recipe.cost}."
        + ("" if recipe.distribution == "trimtab" else f" From {recipe.distribution}.")
    )
    return standalone_command(recipe.name, run)


def _keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


OutOption = Annotated[Path, typer.Option(help="The .safetensors file to write.")]
LayersOption = Annotated[
    str | None, typer.Option(help="Blocks to learn at, from 0: 14, or 12,14,16, or all. Default: chosen by the method.")
]
StrengthOption = Annotated[float, typer.Option(help="Multiply the steering by this before it is saved.")]
_COMMON = [
    _keyword("out", OutOption),
    _keyword("layers", LayersOption, None),
    _keyword("strength", StrengthOption, 1.0),
    _keyword("program", ForOption, None),
    *parameters_of(EngineModelOptions),
    _keyword("json", JsonOption, False),
]


def _source(recipe: Recipe) -> list[inspect.Parameter]:
    if recipe.takes == "nothing":
        return []
    helps = {
        "pairs": "A .jsonl, .json, .csv, .tsv or .parquet file of pairs; `trimtab learn --help` shows their shapes.",
        "texts": "A file of texts: one per line; or .jsonl, .json, .csv, .tsv or .parquet; - reads standard input.",
    }
    source = typer.Option(help=helps[recipe.takes], metavar="FILE")
    column_parameters = parameters_of(ColumnOptions) if recipe.takes == "pairs" else []
    return [_keyword(recipe.takes, Annotated[str, source]), *column_parameters]


def _parameter(option: Option) -> inspect.Parameter:
    kind = TYPES.get(option.kind, str)
    names = [f"--{option.name.replace('_', '-')}"]
    if option.kind == "bool":
        names = [f"{names[0]}/--no-{names[0][2:]}"]
    setting = typer.Option(
        *names,
        help=option.help,
        metavar="|".join(option.choices) or FILES.get(option.kind),
        show_default=option.default is not None,
        rich_help_panel=METHOD,
    )
    default = option.default
    return _keyword(option.name, Annotated[kind if default is not None else kind | None, setting], default)


def _learn(recipe: Recipe, arguments: dict[str, Any]) -> None:
    """Check, read the data, learn and save, in this order, so that nothing is loaded for an invalid request."""
    out, quiet, program = arguments["out"], arguments["json"], arguments["program"]
    from trimtab.commands.learn import parse_layers

    requested_layers = parse_layers(arguments["layers"])
    options_for_program(program, recipe.name, arguments, requested_layers, out)
    loader = pop_group(EngineModelOptions, arguments)
    column_options = pop_group(ColumnOptions, arguments) if recipe.takes == "pairs" else ColumnOptions()
    columns = column_options.to_columns(pairs=recipe.takes == "pairs")
    column = arguments.get("column")
    options = {option.name: _value(option, arguments[option.name], columns, column) for option in recipe.options}
    data: list[Any] = []
    if recipe.takes == "pairs":
        pairs = load_pairs(arguments["pairs"], columns)
        check_shape(recipe, pairs, arguments["pairs"])
        data = [pairs]
    elif recipe.takes == "texts":
        data = [gather_prompts([], arguments["texts"], arguments["column"])]

    from trimtab.report.suggested import named_with_strength, suggested_strength
    from trimtab.steering.steering import check_strength

    strength = check_strength(arguments["strength"])
    lm = loader.load(quiet=quiet)
    layers = list(range(lm.layout.layers)) if isinstance(requested_layers, str) else requested_layers
    with progress_bar("learning", quiet=quiet) as progress:
        chosen = {name: value for name, value in options.items() if value is not None}
        learned = strength * recipe.load()(lm, *data, layers, progress=progress, **chosen)
    learned, digest = save_for(program, learned, out)
    if quiet:
        document = document_of(recipe.name, lm.name, learned, out, digest, strength=strength)
        document["suggested_strength"] = suggested_strength(learned)
        write_json(document | ({"next": commands_for(program, out, scale_for(learned))} if program else {}))
        return
    count = len(data[0]) if data else 0
    title = f"{recipe.name} on {lm.name}" + (f", from {count} {recipe.takes}" if count else "")
    show(title, _table(learned), *_gate_lines(learned), f"saved {out}", *next_steps(program, out, scale_for(learned)))
    shown = named_with_strength(out, learned)
    note(f'try: trimtab generate {loader.model_argument}--steer {shown} --prompt "…" --compare', quiet=False)


def _gate_lines(learned: Steering) -> list[str]:
    """How often a learned gate is open, on the prompts that were used to choose its threshold."""
    condition = learned.card.measured.get("condition")
    if not isinstance(condition, Mapping) or "chosen" not in condition:
        return []
    chosen, target_count, other_count = condition["chosen"], condition["meant"], condition["others"]
    hit_share, false_alarm_share = (
        f"{chosen['hits']:.0%} of {target_count}",
        f"{chosen['false_alarms']:.0%} of {other_count}",
    )
    return [f"its gate is open on {hit_share} target prompts, and on {false_alarm_share} others"]


def _value(option: Option, value: Any, columns: Columns, column: str | None) -> Any:
    """The function's argument for a value from the command line."""
    if value is None:
        return None
    if option.choices and value not in option.choices:
        flag = f"--{option.name.replace('_', '-')}"
        raise TrimtabError(f"{flag} {value!r} is not known; it is one of {', '.join(option.choices)}")
    if option.kind == "pairs":
        return load_pairs(value, columns)
    if option.kind == "texts":
        return gather_prompts([], value, column)
    if option.kind == "positions":
        from trimtab.steering.positions import Positions

        return Positions.parse(value)
    if option.kind == "steering":
        from trimtab.files.load import load as load_steering

        return load_steering(value)
    return value


def document_of(method: str, model: str, learned: Steering, out: Path, digest: str, **more: Any) -> dict[str, Any]:
    """What was learned and written, as a JSON document."""
    return {
        "file": str(out),
        "digest": digest,
        "method": method,
        "model": model,
        **more,
        "options": dict(learned.card.options),
        "measured": dict(learned.card.measured),
        "edits": [str(edit) for edit in learned.edits],
    }


def _table(learned: Steering) -> Table:
    """One row per edit, for the first edits; a last row counts the others."""
    table = Table("site", "does", "strength", "positions", box=None, header_style="dim")
    shown: Sequence[Any] = learned.edits[:12]
    for edit in shown:
        operation = str(edit).split(" * ", 1)[1].split(" @ ")[0]
        table.add_row(str(edit.site), operation, f"{edit.strength:g}", str(edit.positions))
    if len(learned.edits) > len(shown):
        table.add_row(f"… {len(learned.edits) - len(shown)} more")
    return table
