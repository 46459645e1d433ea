"""`trimtab bake`: write a model with a steering in its weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from trimtab.commands.model import (
    DeviceOption,
    JsonOption,
    RevisionOption,
    check_device,
    silence,
    suppress_progress_bars,
)
from trimtab.commands.terminal import note, progress_bar, show, write_json
from trimtab.files.pick import FORM, parse_pick


def bake(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar=FORM,
            help="A steering file, optionally with the layers that act and a strength to multiply it by. Several "
            "are added up.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; it must be empty or not exist.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A Hub id, or a folder with safetensors. Default: SmolLM2-135M-Instruct."),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="all: act at every token, whatever the file says. Weights can't do anything else.", metavar="all"
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Load both models, one after the other, and compare their logits before the folder appears.",
        ),
    ] = True,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="Allow a steering learned on another model of the same width.")
    ] = False,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    json: JsonOption = False,
) -> None:
    """Write a model with a steering in its weights, for programs that can't steer.

    [bold]  trimtab convert direction.pt refusal.safetensors --as ablate --blocks 30
      trimtab bake refusal.safetensors --out without-refusal/
      trimtab bake happy.safetensors:0.8 --positions all --out happy/ \\
        --model meta-llama/Llama-3.2-1B-Instruct[/bold]

    The folder is an ordinary model for transformers, for vLLM, for the converters of
    llama.cpp and MLX, and for finetuning; no hook runs. Directions that are ablated
    where attention, MLPs and embeddings write are removed from those weights
    ("abliteration"). Directions that are added become biases, if the model's
    configuration can declare them. Those of Qwen, Mistral and Gemma can't, and the
    error lists alternatives.

    Gates, positions other than all, and operations other than adding and ablating are
    errors that name the edit, since weights can't express them.

    Weights are read and written one file at a time. The folder appears once everything
    is written and checked; its README.md and trimtab.json record what was baked in.
    Quantized models are refused.
    """
    picks = [parse_pick(text, "bake") for text in files]
    quiet = suppress_progress_bars(json)
    if check:
        check_device(device)
    silence(quiet)
    from trimtab.baking.bake import bake as bake_model
    from trimtab.steering import Positions

    rule = None if positions is None else Positions.parse(positions)
    loaded = [pick.load() for pick in picks]
    steering = sum(loaded[1:], loaded[0])
    steering = steering if rule is None else steering.at(rule)
    with progress_bar("writing", quiet=json) as progress:
        baked = bake_model(
            model,
            steering,
            out,
            transfer=transfer,
            check=check,
            revision=revision,
            device=device,
            progress=progress,
        )
    if json:
        write_json({**asdict(baked), "folder": str(baked.folder), "edits": [str(edit) for edit in steering.edits]})
        return
    what = f"{baked.changed} tensors changed" + (f", {baked.biases} biases added" if baked.biases else "")
    edits = f"{len(steering.edits)} edit{'s' * (len(steering.edits) != 1)}"
    show(f"wrote {out}: {baked.model} with {edits} in its weights ({what})", *baked.notes)
    if baked.checked is not None:
        show(
            f"checked: its logits differ from the steered model's by {baked.checked.difference:.2g} of their norm; the"
            f" steering itself changes them by {baked.checked.effect:.2g}"
        )
    note(f'try: trimtab generate --model {out} --prompt "…"', quiet=False)
