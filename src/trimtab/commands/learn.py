"""`trimtab learn`: a steering from pairs of texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from trimtab.commands.model import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    LayersPathOption,
    ModelOption,
    RevisionOption,
    load_model,
)
from trimtab.commands.recipes import recipe_for
from trimtab.commands.terminal import note, progress_bar, show, write_json
from trimtab.errors import TrimtabError
from trimtab.files.target import check_target
from trimtab.text.pairs import read_pairs

if TYPE_CHECKING:
    from trimtab.report.pushes import Push


def learn(
    method: Annotated[
        str, typer.Argument(help="caa or instruct; `trimtab methods` tells them apart.", show_default=False)
    ],
    pairs: Annotated[Path, typer.Option(help="A .jsonl, .json or .csv file of pairs.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.", show_default=False)],
    layers: Annotated[
        str | None,
        typer.Option(
            help="Blocks to learn at, from 0: 14, or 12,14,16, or all. Without it: the method's own choice.",
            show_default=False,
        ),
    ] = None,
    strength: Annotated[float, typer.Option(help="Multiply the steering by this before it is saved.")] = 1.0,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    layers_path: LayersPathOption = None,
    json: JsonOption = False,
) -> None:
    """Learn a steering from contrastive pairs and save it to a file.

    [bold]  trimtab learn instruct --pairs shout.jsonl --out shout.safetensors
      trimtab learn caa --pairs rude.csv --layers 12 --out rude.safetensors
      trimtab learn caa --pairs rude.csv --layers all --out all.safetensors \\
        --model Qwen/Qwen2.5-1.5B-Instruct --strength -1[/bold]

    Pairs come as JSONL (one object a line), JSON (a list of objects) or CSV
    (with a header line). Each pair has the keys of one of these shapes:

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

    Nothing is written until all is learned; an existing file is replaced.
    """
    check_target(out, ".safetensors")
    read = read_pairs(pairs)
    recipe = recipe_for(method, read, str(pairs))
    wanted = parse_layers(layers)

    from trimtab.files.steering_file import save_steering
    from trimtab.report.pushes import pushes
    from trimtab.steering.steering import check_strength

    check_strength(strength)
    function = recipe.load()
    lm = load_model(model, device=device, dtype=dtype, revision=revision, layers_path=layers_path, quiet=json)
    chosen = list(range(lm.layout.layers)) if wanted == "all" else wanted
    with progress_bar("learning", quiet=json) as progress:
        steering = strength * function(lm, read, chosen, progress=progress)
    digest = save_steering(steering, out)
    learned = pushes(steering)
    if json:
        write_json(_document(out, digest, method, lm.name, len(read), strength, learned))
        return
    show(f"{method} on {lm.name}, from {len(read)} pairs", _table(learned), f"saved {out}")
    note(
        f'try: trimtab generate {f"--model {model} " if model else ""}--steer {out} --prompt "…" --compare', quiet=json
    )


def parse_layers(text: str | None) -> list[int] | str | None:
    """`None`, `"all"`, or the numbers of `"12,14"`. Raises `TrimtabError` for anything else."""
    if text is None or text.strip() == "all":
        return text and "all"
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise TrimtabError(f"--layers {text!r} is no list of blocks; write 14, or 12,14,16, or all") from None


def _document(
    out: Path, digest: str, method: str, model: str, pairs: int, strength: float, learned: list[Push]
) -> dict[str, Any]:
    return {
        "file": str(out),
        "digest": digest,
        "method": method,
        "model": model,
        "pairs": pairs,
        "strength": strength,
        "layers": [
            {
                "layer": push.layer,
                "norm": push.norm,
                "activation_norm": push.activation_norm,
                "agreement": push.agreement,
            }
            for push in learned
        ],
    }


def _table(learned: list[Push]) -> Table:
    table = Table("layer", "norm", "of the activation's", "agreement of the pairs", box=None, header_style="dim")
    for column in table.columns:
        column.justify = "right"
    for push in learned:
        share = "" if push.share is None else f"{push.share:.0%}"
        agreement = "" if push.agreement is None else f"{push.agreement:.2f}"
        table.add_row(str(push.layer), f"{push.norm:.4g}", share, agreement)
    return table
