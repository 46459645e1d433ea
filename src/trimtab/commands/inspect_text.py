"""`trimtab inspect` with a model or two files: a text's tokens, pairs in their principal plane, and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from trimtab.commands.terminal import show, write_json
from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import write_atomically
from trimtab.files.pick import Pick

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.text.pairs import Pair

DRAWN_LAYERS = 9
DRAWN_PAIRS = 200


def show_text(
    lm: LM,
    pick: Pick,
    text: str,
    layer: int | None,
    page: Path | None,
    plot: Path | None,
    *,
    transfer: bool,
    json: bool,
) -> None:
    """Show the text, each token colored by its cosine with the file's direction at this layer, or at all its layers."""
    from trimtab.report.tokens import color_limit, coloured_cosines, draw_tokens, token_cosines, tokens_page

    steering = pick.load()
    by_layer = token_cosines(lm, steering, text, None if layer is None else [layer], transfer=transfer)
    max_cosine = color_limit(by_layer)
    title = (
        f"Cosine with {pick.path.stem}"
        + (f" at layer {by_layer[0].layer}" if len(by_layer) == 1 else "")
        + f", {lm.name}"
    )
    written = {}
    if page is not None:
        write_atomically(page, tokens_page(by_layer, title).encode("utf-8", "backslashreplace"))
        written["html"] = str(page)
    if plot is not None:
        write_atomically(plot, draw_tokens(by_layer, title))
        written["plot"] = str(plot)
    if json:
        layers = [{"layer": each.layer, "cosines": list(each.cosines)} for each in by_layer]
        write_json(
            {"file": str(pick.path), "model": lm.name, "tokens": list(by_layer[0].pieces), "layers": layers, **written}
        )
        return
    show(f"{title}: blue along it, red against it, full color at ±{max_cosine:.2f}")
    for row in by_layer:
        show("", f"layer {row.layer}", coloured_cosines(row, max_cosine))
    _print_written(written)


def show_plane(
    lm: LM,
    pick: Pick,
    pairs: Path,
    pair_list: Sequence[Pair],
    layer: int | None,
    plot: Path,
    *,
    transfer: bool,
    json: bool,
) -> None:
    """Draw two principal components of the pairs' activations at each of the file's layers, read as for the file."""
    from trimtab.evaluate.ab import evenly_spaced
    from trimtab.methods.caa import activations, read_at_of
    from trimtab.report.sweep import draw_planes, plane
    from trimtab.text.letters import letter_of

    steering, sampled_pairs = pick.load(), evenly_spaced(pair_list, DRAWN_PAIRS)
    if len(sampled_pairs) < 2:
        raise TrimtabError(f"{pairs} has {len(sampled_pairs)} pair; a plane needs at least two")
    lm.check(steering, transfer=transfer)
    layers = [layer] if layer is not None else list(evenly_spaced(steering.layers, DRAWN_LAYERS))
    steering.only(layers)  # raises for layers that it doesn't have
    lettered = sampled_pairs[0].shape == "letters"
    by_layer = activations(lm, sampled_pairs, layers, read_at=None if lettered else read_at_of(steering.card))
    letters = (
        [(letter_of(str(pair.positive)), letter_of(str(pair.negative))) for pair in sampled_pairs] if lettered else None
    )
    source_name = f"{pairs.parent.name}/{pairs.name}" if pairs.parent.name else pairs.name
    write_atomically(
        plot,
        draw_planes(
            by_layer, letters, f"{len(sampled_pairs)} pairs of {source_name}, two principal components, {lm.name}"
        ),
    )
    shares = {at: plane(values.flatten(0, 1))[1] for at, values in by_layer.items()}
    if json:
        listed = [{"layer": at, "variance": list(of)} for at, of in shares.items()]
        write_json(
            {
                "file": str(pick.path),
                "pairs": str(pairs),
                "drawn": len(sampled_pairs),
                "layers": listed,
                "plot": str(plot),
            }
        )
        return
    show(f"{len(sampled_pairs)} pairs of {pairs} at layers {', '.join(map(str, shares))}")
    _print_written({"plot": str(plot)})


def show_two(picks: Sequence[Pick], plot: Path | None, *, json: bool) -> None:
    """Show the cosines between the directions of two files, layer by layer; the plot has each layer with each."""
    from trimtab.report.sweep import draw_similarity, similarity_between

    first, other = (file.load() for file in picks)
    layers, across, cosines = similarity_between(first, other)
    names = (picks[0].path.stem, picks[1].path.stem)
    written = {}
    if plot is not None:
        title = f"{names[0]}, layer by layer" if names[0] == names[1] else f"{names[0]} and {names[1]}"
        write_atomically(plot, draw_similarity(layers, cosines, title, across=across, names=names))
        written["plot"] = str(plot)
    document: dict[str, Any] = {
        "files": [str(file.path) for file in picks],
        "models": [[model.name for model in steering.card.models] for steering in (first, other)],
        "layers": layers,
        "across": across,
        "cosines": cosines.tolist(),
        **written,
    }
    if json:
        write_json(document)
        return
    show(f"{picks[0]} and {picks[1]}: cosine of their directions")
    show(_nearest(layers, across, document["cosines"], names))
    _print_written(written)


def _nearest(layers: Sequence[int], across: Sequence[int], cosines: Sequence[Sequence[float]], names: Any) -> Table:
    """For each layer of the first: the cosine at the same layer of the other, and its most similar other layer."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for name in (f"layer of {names[0]}", "same layer", f"otherwise most similar in {names[1]}", "cosine"):
        table.add_column(name, justify="right")
    for layer, row in zip(layers, cosines, strict=True):
        same = f"{row[across.index(layer)]:+.3f}" if layer in across else ""
        elsewhere = [i for i in range(len(row)) if across[i] != layer]
        best = max(elsewhere, key=lambda i: abs(row[i]), default=None)
        table.add_row(str(layer), same, *(("", "") if best is None else (str(across[best]), f"{row[best]:+.3f}")))
    return table


def _print_written(written: dict[str, str]) -> None:
    for path in written.values():
        show("", f"wrote {path}")
