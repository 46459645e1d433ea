"""`trimtab learn probe`: learn a monitor from pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.commands.model import EngineModelOptions, JsonOption
from trimtab.commands.options import grouped, standalone_command
from trimtab.commands.pair_files import ColumnOptions
from trimtab.commands.terminal import note, progress_bar, show, write_json
from trimtab.files.atomic_write import check_target


@grouped
def learn_probe(
    *,
    pairs: Annotated[
        Path,
        typer.Option(
            help="A .jsonl, .json, .csv, .tsv or .parquet file of pairs of answers, or of texts.", metavar="FILE"
        ),
    ],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    columns: ColumnOptions,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Blocks to look at, from 0: 14, or 12,14,16, or all. Default: every fourth, from a quarter of the"
            " depth on."
        ),
    ] = None,
    read_at: Annotated[
        str, typer.Option(help="Which tokens of an answer to read: answer (all), first:K, after:MARKER or last.")
    ] = "answer",
    false_alarms: Annotated[
        float,
        typer.Option(help="The share of held-out negative answers that may have a token beyond the threshold."),
    ] = 0.05,
    loader: EngineModelOptions,
    json: JsonOption = False,
) -> None:
    """Learn a probe: a direction and a threshold that detect the tokens of positive answers.

    [bold]  trimtab learn probe --pairs harm.jsonl --out harm.safetensors
      trimtab serve --monitor harm=harm.safetensors[/bold]

    The probe is a logistic regression on the tokens of half of the answers, at the best
    of the layers. The held-out answers, each represented by its highest-scoring token,
    show how well it separates the two kinds (the area under the curve; 0.5 is chance).
    The threshold is set so that at most --false-alarms of the negative ones have a
    token above it.

    A server reads the probe at each token (--monitor); in Python, use lm.generate(…,
    monitors=Monitor.of("harm", load("harm.safetensors"))). The file is a steering whose
    gate is the probe, so it can also switch other steerings on and off depending on the
    prompt: steering.when(probe.edits[0].gate).
    """
    from trimtab.commands.learn import parse_layers

    check_target(out, ".safetensors")
    requested_layers = parse_layers(layers)
    pair_list = columns.read(pairs)
    from trimtab.files.steering_file import save_steering
    from trimtab.learn.probe import learn_probe as learn

    lm = loader.load(quiet=json)
    chosen_layers = list(range(lm.layout.layers)) if isinstance(requested_layers, str) else requested_layers
    with progress_bar("reading", quiet=json) as progress:
        learned = learn(lm, pair_list, chosen_layers, read_at=read_at, false_alarms=false_alarms, progress=progress)
    digest = save_steering(learned, out)
    measured = learned.card.measured
    if json:
        from trimtab.commands.learn_method import document_of

        write_json(document_of("probe", lm.name, learned, out, digest))
        return
    show(
        f"probe on {lm.name}, from {len(pair_list)} pairs: layer {measured['layer']}",
        f"area under the curve {measured['area']:.3f}, on {measured['held_out']} held-out pairs",
        f"threshold {measured['threshold']:.3g}: beyond it are {measured['hits']:.0%} of the positive answers"
        f" and {measured['false_alarms']:.0%} of the negative ones",
        f"saved {out}",
    )
    note(f"try: trimtab serve {loader.model_argument}--monitor {out.stem}={out}", quiet=False)


def command() -> Any:
    """The command."""
    return standalone_command("probe", learn_probe)
