"""`trimtab inspect`: the contents of a steering file, and the cosines of a text with its directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from trimtab.commands.model import EngineModelOptions, JsonOption
from trimtab.commands.options import check_picture, grouped
from trimtab.commands.pair_files import ColumnOptions, load_pairs
from trimtab.commands.terminal import show, write_json
from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import check_target
from trimtab.files.pick import Pick, parse_pick
from trimtab.report.described import card_rows, describe_gate, edit_columns, origin

if TYPE_CHECKING:
    from trimtab.report.pushes import Push
    from trimtab.steering import Card, Steering

EIGHTHS = " ▏▎▍▌▋▊▉█"
BAR = 24  # in columns


@grouped
def inspect(
    *,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE[@LAYERS][:STRENGTH] …",
            help="A steering file, or two to compare; @14, @14,15 or @10-14 selects layers, :2 multiplies the "
            "strength.",
        ),
    ],
    plot: Annotated[
        Path | None, typer.Option(help="Draw a picture of it into this .png (needs trimtab\\[plot]).")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Color each token of this text by its cosine with the direction.")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Draw these pairs' activations, as two principal components per layer.")
    ] = None,
    columns: ColumnOptions,
    layer: Annotated[
        int | None, typer.Option(help="With --text or --pairs: use this layer instead of all of the file's.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--html", help="With --text: write the colored text into this .html page.")
    ] = None,
    nats: Annotated[
        bool,
        typer.Option(
            "--nats",
            help="Measure the divergence from the unsteered model, in nats per token; --model does so as well.",
        ),
    ] = False,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="If the model is loaded: allow another one of the same width.")
    ] = False,
    loader: EngineModelOptions,
    json: JsonOption = False,
) -> None:
    """Show a steering file: its origin, its edits, and how hard they push.

    [bold]  trimtab inspect shout.safetensors
      trimtab inspect shout.safetensors@10-14:0.8 --plot shout.png
      trimtab inspect shout.safetensors --text "HELLO there" --layer 14 --html hello.html
      trimtab inspect shout.safetensors --pairs shout.jsonl --plot planes.png
      trimtab inspect shout.safetensors --nats
      trimtab inspect shout.safetensors rude.safetensors --plot alike.png
      trimtab inspect shout.safetensors --json[/bold]

    The norm is that of the direction, times the strength if the edit adds it. Its ratio
    to the activation's norm shows how hard it pushes: near 100 % and above, text tends
    to break. The agreement is the mean cosine between the pairs' differences and their
    mean: low agreement means a weak steering. The suggested strength gives a mild push
    over all layers; without one, the file acts at strength 1.

    Two files are compared layer by layer, whatever their methods and models, if their
    widths agree; name a file twice to compare its layers with each other. --text and
    --pairs load the model; the text is read without a chat template. --nats and --model
    load it, too, and measure the divergence from the unsteered model on answers to
    eight plain queries.
    """
    _check_options(files, plot, text, pairs, layer, page)
    if nats and (len(files) == 2 or text is not None or pairs is not None):
        raise TrimtabError("--nats takes one file, without --text or --pairs")
    column_mapping = columns.to_columns(pairs=pairs is not None)
    picks = [parse_pick(file, "inspect") for file in files]
    check_picture(plot)
    if page is not None:
        check_target(page, ".html")
    if len(picks) == 2:
        from trimtab.commands.inspect_text import show_two

        show_two(picks, plot, json=json)
        return
    pick = picks[0]
    if text is not None or pairs is not None:
        from trimtab.commands.inspect_text import show_plane, show_text

        pair_list = load_pairs(pairs, column_mapping)
        lm = loader.load(quiet=json)
        if text is not None:
            show_text(lm, pick, text, layer, page, plot, transfer=transfer, json=json)
        elif pairs is not None and plot is not None:
            show_plane(lm, pick, pairs, pair_list, layer, plot, transfer=transfer, json=json)
        return

    from trimtab.files.steering_file import describes, steering_digest
    from trimtab.report.pushes import pushes
    from trimtab.report.suggested import MILD, has_its_strength, suggested_strength

    steering = pick.load()
    divergence = divergence_of(steering, loader, transfer=transfer, quiet=json) if nats or loader.model else None
    digest, edit_pushes = steering_digest(steering), pushes(steering)
    suggested = suggested_strength(steering)
    if plot is not None:
        from trimtab.report.plots import plot_pushes

        plot_pushes(edit_pushes, plot, f"{pick.path.name}{pick.layer_suffix}: {origin(steering.card)}")
    if json:
        measured = {} if divergence is None else {"divergence": divergence}
        write_json(
            {**_document(pick, digest, steering, edit_pushes, plot), "suggested_strength": suggested, **measured}
        )
        return
    show(f"{pick}: {origin(steering.card)}", *_cards(steering.card, digest), "", *_edits(steering, edit_pushes))
    if suggested is not None:
        why = "as it was found" if has_its_strength(steering) else f"an overall dose of about {MILD:g}"
        show("", f"suggested strength: {suggested:g} ({why})")
    if divergence is not None:
        show(
            "",
            f"divergence on {divergence['model']}: {divergence['mean']:.3g} nats per token, 95th percentile"
            f" {divergence['p95']:.3g}",
        )
    audit, stored = steering.card.audit, steering.card.divergence
    if audit is not None and not describes(audit, steering):
        show("", "the audit in its card was run with other strengths or layers than these; run trimtab audit again")
    if stored is not None and not describes(stored, steering):
        again = "" if divergence is not None else "; trimtab inspect --nats measures it again"
        show("", f"the divergence in its card was measured with other strengths or layers than these{again}")
    if plot is not None:
        show("", f"drew {plot}")


def divergence_of(steering: Steering, loader: EngineModelOptions, *, transfer: bool, quiet: bool) -> dict[str, Any]:
    """The divergence of a steered model from the unsteered one, on answers to eight of the package's queries.

    Raises:
        TrimtabError: The model can't be loaded, the steering doesn't fit, or the engine gives no probabilities.
    """
    from trimtab.data import queries

    lm = loader.load(quiet=quiet)
    lm.require("logits")
    divergence = lm.divergence(steering, list(queries("test")[:8]), transfer=transfer)
    return {"model": lm.name, "mean": divergence.mean, "p95": divergence.p95, "tokens": divergence.tokens}


def _check_options(
    files: Sequence[str], plot: Path | None, text: str | None, pairs: Path | None, layer: int | None, page: Path | None
) -> None:
    """Raise `TrimtabError` for options that don't go together."""
    if len(files) > 2:
        raise TrimtabError(f"two files are compared, not {len(files)}")
    if len(files) == 2 and (text is not None or pairs is not None):
        raise TrimtabError("--text and --pairs take one file; give one")
    if text is not None and pairs is not None:
        raise TrimtabError("--text and --pairs are two pictures; ask for one at a time")
    if pairs is not None and plot is None:
        raise TrimtabError("--pairs draws a picture; say where with --plot FILE.png")
    if layer is not None and text is None and pairs is None:
        raise TrimtabError("--layer needs --text or --pairs")
    if page is not None and text is None:
        raise TrimtabError("--html needs a text; give --text TEXT")


def _document(
    pick: Pick, digest: str, steering: Steering, edit_pushes: Sequence[Push], plot: Path | None
) -> dict[str, Any]:
    from trimtab.steering.operations import NAMES

    edits = []
    for edit, push in zip(steering.edits, edit_pushes, strict=True):
        edits.append(
            {
                "site": str(edit.site),
                "layer": edit.site.layer,
                "operation": NAMES[type(edit.operation)],
                "keep_norm": edit.operation.keep_norm,
                "width": edit.operation.width,
                "strength": edit.strength,
                "positions": str(edit.positions),
                "gate": describe_gate(edit.gate),
                "norm": push.norm,
                "activation_norm": push.activation_norm,
                "agreement": push.agreement,
            }
        )
    drawn = {} if plot is None else {"plot": str(plot)}
    return {"file": str(pick.path), "digest": digest, "card": asdict(steering.card), "edits": edits, **drawn}


def _cards(card: Card, digest: str) -> list[Table]:
    """The card as a table, followed by one for each of its parts."""
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in card_rows(card):
        table.add_row(name, value)
    if digest:
        table.add_row("digest", digest)
    tables = [table]
    for number, part in enumerate(card.parts, 1):
        head = Table(f"part {number}: {origin(part)}", box=None, pad_edge=False, header_style="")
        tables += [head, *_cards(part, "")]
    return tables


def _edits(steering: Steering, edit_pushes: Sequence[Push]) -> tuple[str, Table]:
    """The shared properties of all edits as one line, and a table of the rest with a bar for the norm of each push."""
    line, columns = edit_columns(steering, edit_pushes)
    longest = max(push.norm for push in edit_pushes)
    shown: dict[str, list[str]] = {
        "layer": [str(edit.site.layer) for edit in steering.edits],
        "norm": [f"{push.norm:.4g}" for push in edit_pushes],
        " ": [bar(push.norm, longest) for push in edit_pushes],
        **columns,
    }
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in shown:
        words = name in ("operation", "at", "when")
        style = "cyan" if name == " " else ""
        table.add_column(name, justify="left" if words or name == " " else "right", style=style, no_wrap=not words)
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*cells)
    return line, table


def bar(value: float, longest: float, columns: int = BAR) -> str:
    """A bar of block characters, precise to an eighth of a column; `longest` fills all `columns`."""
    eighths = round(8 * columns * value / longest) if longest > 0 else 0
    full, rest = divmod(max(eighths, 1 if value > 0 else 0), 8)
    return "█" * full + EIGHTHS[rest].strip()
