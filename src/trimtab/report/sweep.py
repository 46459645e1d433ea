"""Plots of an evaluation: scores by layer and strength, cosines between vectors, and pairs in their principal plane."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError
from trimtab.evaluate.intervals import Interval
from trimtab.report.plots import check_matplotlib
from trimtab.steering.directions import directions as directions

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.steering import Steering

RANDOM = "#9a9a9a"
MOST_BARS = 4
"""With more layers, only this many lines are coloured, and none has bars."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
OTHERS = "#c4c4c4"
SPAN = 0.2
"""The minimum height of a sweep's axis, so that a difference of a hundredth looks small."""


@dataclass(frozen=True)
class Cell:
    """A score at one layer and strength; `layer` is `None` if a steering acts at several at once."""

    layer: int | None
    strength: float
    score: Interval
    random: bool = False


def draw_sweep(cells: Sequence[Cell], baseline: Interval, title: str, score: str) -> bytes:
    """A PNG: the score by strength, one line per layer, and a map of layer × strength if there are several layers.

    Every line passes through the unsteered score at strength 0. Bars are 95 % intervals. With many layers, only
    those that change the score most are coloured, the others are gray, and there are no bars, which would hide each
    other. The gray band spans the random directions of all layers, from the lowest to the highest score at each
    strength.

    Args:
        cells: The scores by layer and strength, those of random directions included.
        baseline: The unsteered score.
        title: The title of the figure.
        score: The name of the score.

    Raises:
        TrimtabError: Nothing was steered, or matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    steered = [cell for cell in cells if not cell.random]
    if not steered:
        raise TrimtabError("nothing was steered, so there is no sweep to draw")
    layers = sorted({cell.layer for cell in steered}, key=lambda layer: (layer is None, layer))
    mapped = len(layers) > 1 and None not in layers
    figure = Figure(figsize=(11 if mapped else 6, 4.4), layout="constrained")
    axes = figure.subplots(1, 2 if mapped else 1, squeeze=False)[0]
    _random_band(axes[0], cells, baseline)
    many = len(layers) > MOST_BARS
    shown = _most_changed(steered, baseline)
    colours = dict(zip((layer for layer in layers if layer in shown), COLOURS, strict=False))
    for layer in sorted(layers, key=lambda layer: (layer in colours, layer is None, layer)):
        mine = sorted((cell for cell in steered if cell.layer == layer), key=lambda cell: cell.strength)
        points = sorted([(cell.strength, cell.score) for cell in mine] + [(0.0, baseline)], key=lambda point: point[0])
        x, means = [at for at, _ in points], [interval.estimate for _, interval in points]
        bars = [
            [interval.estimate - interval.low for _, interval in points],
            [interval.high - interval.estimate for _, interval in points],
        ]
        label = "all its layers" if layer is None else f"layer {layer}"
        axes[0].errorbar(
            x,
            means,
            yerr=None if many else bars,
            fmt="o-",
            color=colours.get(layer, OTHERS),
            capsize=2,
            markersize=4,
            elinewidth=0.8,
            label=label if layer in colours else "_",
        )
    if many:
        others = len(layers) - len(colours)
        label = f"{others} other layer{'s' * (others != 1)}"
        axes[0].plot([], [], "o-", color=OTHERS, markersize=4, label=label)
    else:
        axes[0].errorbar([], [], yerr=[], fmt="none", ecolor="#555555", capsize=2, label="95 % interval")
    axes[0].axhline(baseline.estimate, color="#888888", linestyle="--", linewidth=1, label="unsteered")
    axes[0].set_xlabel("strength")
    axes[0].set_ylabel(score)
    low, high = axes[0].get_ylim()
    if high - low < SPAN:
        bottom = (low + high - SPAN) / 2
        if axes[0].dataLim.ymin >= 0:  # no room for negative shares
            bottom = max(bottom, -SPAN / 50)
        axes[0].set_ylim(bottom, bottom + SPAN)
    axes[0].legend(fontsize=8, frameon=False)
    axes[0].spines[["top", "right"]].set_visible(False)
    axes[0].grid(axis="y", alpha=0.25)
    if mapped:
        _map(figure, axes[1], steered, [layer for layer in layers if layer is not None], baseline)
    figure.suptitle(fill(title, int(11 * figure.get_figwidth())), x=0.01, ha="left", fontsize=11)
    return as_png(figure)


def _most_changed(cells: Sequence[Cell], baseline: Interval) -> list[int | None]:
    """Up to `MOST_BARS` layers, those at which the score differs most from the unsteered one at any strength."""
    changes: dict[int | None, float] = {}
    for cell in cells:
        change = abs(cell.score.estimate - baseline.estimate)
        changes[cell.layer] = max(change, changes.get(cell.layer, 0.0))
    return sorted(changes, key=lambda layer: -changes[layer])[:MOST_BARS]


def _random_band(axes: Any, cells: Sequence[Cell], baseline: Interval) -> None:
    by_strength: dict[float, list[float]] = {}
    for cell in cells:
        if cell.random:
            by_strength.setdefault(cell.strength, []).append(cell.score.estimate)
    if not by_strength:
        return
    by_strength[0.0] = [baseline.estimate]
    x = sorted(by_strength)
    low, high = [min(by_strength[at]) for at in x], [max(by_strength[at]) for at in x]
    axes.fill_between(x, low, high, color=RANDOM, alpha=0.35, linewidth=0, label="random directions")


def _map(figure: Any, axes: Any, cells: Sequence[Cell], layers: Sequence[int], baseline: Interval) -> None:
    import numpy as np

    strengths = sorted({cell.strength for cell in cells})
    gains = np.full((len(strengths), len(layers)), np.nan)
    for cell in cells:
        assert cell.layer is not None
        gains[strengths.index(cell.strength), layers.index(cell.layer)] = cell.score.estimate - baseline.estimate
    reach = max(0.05, float(np.nanmax(np.abs(gains))))
    image = axes.imshow(gains, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto", origin="lower")
    for (y, x), gain in np.ndenumerate(gains):
        if not np.isnan(gain):
            colour = "white" if abs(gain) > 0.6 * reach else "#222222"
            text = f"{baseline.estimate + gain:.2f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(strengths)), [f"{strength:g}" for strength in strengths])
    axes.set_xlabel("layer")
    axes.set_ylabel("strength")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.85).set_label("change from unsteered", fontsize=9)
    axes.set_title("numbers: the score; colours: its change", loc="left", fontsize=9)


def similarity(steering: Steering) -> tuple[list[int], Tensor]:
    """The layers at which the steering has a direction, and the cosines between these: `[layers, layers]`.

    Raises `TrimtabError` like `directions`.
    """
    layers, _, cosines = similarity_between(steering, steering)
    return layers, cosines


def similarity_between(first: Steering, other: Steering) -> tuple[list[int], list[int], Tensor]:
    """The layers of both, and the cosines between their directions: `[layers of first, layers of other]`.

    The two may come from different methods and models, as long as the widths agree. Between separately trained models,
    cosines are meaningful only if one was made from the other (a base model and its chat model, say). Raises
    `TrimtabError` like `directions`, and for different widths.
    """
    import torch

    a, b = directions(first), directions(other)
    stacks = torch.stack(list(a.values())), torch.stack(list(b.values()))
    widths = [stack.shape[1] for stack in stacks]
    if widths[0] != widths[1]:
        raise TrimtabError(f"directions of width {widths[0]} and {widths[1]} can't be compared")
    return list(a), list(b), stacks[0] @ stacks[1].T


def draw_similarity(
    layers: Sequence[int],
    cosines: Tensor,
    title: str,
    *,
    across: Sequence[int] | None = None,
    names: tuple[str, str] = ("", ""),
) -> bytes:
    """A PNG of the layer × layer cosines of a behaviour's vectors, or of two steerings'.

    `cosines` is `[layers, across]`, where `across` are the other steering's layers (default: the same ones), and
    `names` are the names of the two.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    across = layers if across is None else across
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cosines.numpy(), cmap="RdBu", vmin=-1, vmax=1, origin="lower", aspect="auto")
    for axis, listed, name in ((axes.yaxis, layers, names[0]), (axes.xaxis, across, names[1])):
        shown = range(0, len(listed), max(1, len(listed) // 12))
        axis.set_ticks(shown, [str(listed[i]) for i in shown])
        axis.set_label_text(f"layer of {name}" if name else "layer", parse_math=False)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.85).set_label("cosine", fontsize=9)
    axes.set_title(fill(title, 52), loc="left", fontsize=11, parse_math=False)
    return as_png(figure)


def plane(activations: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """The first two principal components of `[items, width]`, as `[items, 2]`, and the share of variance of each.

    The sign of a component is chosen so that its largest coordinate is positive, which keeps plots from flipping.
    """
    import torch

    from trimtab.steering.tensors import to_float64

    wide = to_float64(activations)
    centred = wide - wide.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    points = u[:, :2] * s[:2]
    largest = points.gather(0, points.abs().argmax(0, keepdim=True))
    total = float((s**2).sum()) or 1.0
    shares = (s[:2] ** 2 / total).tolist()
    return points * torch.where(largest < 0, -1.0, 1.0), (shares[0], shares[1])


def draw_planes(activations: Mapping[int, Tensor], letters: Sequence[tuple[str, str]] | None, title: str) -> bytes:
    """A PNG: for each layer, the pairs' activations `[pairs, 2, width]` (positive, negative) in their principal plane.

    The color is the side of the pair. With `letters`, the markers are those of the positive and the negative answer,
    which shows whether the behaviour or the letter separates the points.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    columns = min(3, len(activations))
    rows = -(-len(activations) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.4, 3.3 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    kinds = sorted({letter for pair in letters or [("", "")] for letter in pair})
    markers = dict(zip(kinds, "o^sDvP*X", strict=False))
    for axis, (layer, values) in zip(axes.flat, sorted(activations.items()), strict=False):
        points, shares = plane(values.flatten(0, 1))
        sides = points.reshape(len(values), 2, 2)
        for side, colour, name in ((0, "#b5651d", "positive"), (1, "#33658a", "negative")):
            for kind in kinds:
                mine = [i for i in range(len(values)) if (letters[i][side] if letters else "") == kind]
                label = f"{name} {kind}".strip()
                x, y = sides[mine, side, 0], sides[mine, side, 1]
                axis.scatter(x, y, s=16, c=colour, marker=markers[kind], alpha=0.65, linewidths=0, label=label)
        axis.set_title(f"layer {layer}", fontsize=9, loc="left")
        axis.set_xlabel(f"{shares[0]:.0%} of the variance", fontsize=8)
        axis.set_ylabel(f"{shares[1]:.0%}", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in list(axes.flat)[len(activations) :]:
        axis.set_axis_off()
    handles, names = axes.flat[0].get_legend_handles_labels()
    legend_columns = 4 if columns > 1 else 2  # a single plane is too narrow for four names
    figure.legend(handles, names, loc="outside lower center", ncols=legend_columns, fontsize=8, frameon=False)
    figure.suptitle(fill(title, int(11 * figure.get_figwidth())), x=0.01, ha="left", fontsize=11)
    return as_png(figure)


def as_png(figure: Any) -> bytes:
    """The bytes of a figure's PNG; the same figure gives the same bytes."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, metadata={"Software": "trimtab"})
    return data.getvalue()
