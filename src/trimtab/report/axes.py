"""Plots on matplotlib axes for notebooks: drawn into given axes, or into new ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError
from trimtab.report.plots import check_matplotlib

if TYPE_CHECKING:
    from trimtab.steering import Steering
    from trimtab.tune.sweep import Sweep, SweepRow


CROSS: dict[str, Any] = {"marker": "X", "linestyle": "", "markersize": 8, "markeredgecolor": "#b83e30", "zorder": 3}
"""The marker of a setting that breaks the guard, in the color of its line: lines often overlap."""


def axes_or_new(ax: Any, size: tuple[float, float] = (6.4, 3.2)) -> Any:
    """The given axes, or those of a new figure of this size in inches, which a notebook then shows.

    Raises:
        TrimtabError: matplotlib is missing, or `ax` isn't matplotlib axes.
    """
    check_matplotlib()
    if ax is not None:
        if not hasattr(ax, "bar") or not hasattr(ax, "set_xlabel"):
            raise TrimtabError(f"ax is one of matplotlib's Axes, got {type(ax).__name__}; leave it out for new ones")
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, layout="constrained")[1]


def tidy(axes: Any) -> None:
    """Hide the top and right spines, and draw a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def draw_steering(steering: Steering, ax: Any = None) -> Any:
    """Draw a bar for how hard each layer is pushed; bars of edits at the same layer are side by side.

    Raises:
        TrimtabError: matplotlib is missing, the steering has no edits, or it steers attention, which has no direction.
    """
    from trimtab.report.described import origin
    from trimtab.report.plots import push_bars
    from trimtab.report.pushes import pushes

    if not steering.edits:
        raise TrimtabError("this steering has no edits, so there is nothing to draw")
    edit_pushes = pushes(steering)
    axes = axes_or_new(ax)
    push_bars(axes, edit_pushes)
    axes.set_xlabel("layer")
    axes.set_title(origin(steering.card), loc="left", fontsize=11, parse_math=False)
    tidy(axes)
    return axes


def draw_cosine_bars(cosines: Mapping[int, float], ax: Any = None) -> Any:
    """Draw a bar for the cosine at each layer, from -1 to 1, in the colors of `token_cosines`."""
    from trimtab.report.tokens import BLUE, RED

    axes = axes_or_new(ax)
    colors = [tuple(part / 255 for part in (BLUE if value > 0 else RED)) for value in cosines.values()]
    axes.bar(list(cosines), list(cosines.values()), width=0.8 if len(cosines) > 3 else 0.2, color=colors)
    axes.axhline(0, color="#888888", linewidth=1)
    axes.set_xticks(list(cosines))
    axes.set_xlim(min(cosines) - 1, max(cosines) + 1)
    axes.set_ylim(-1.05, 1.05)
    axes.set_xlabel("layer")
    axes.set_ylabel("cosine")
    tidy(axes)
    return axes


def draw_sweep_lines(sweep: Sweep, ax: Any = None) -> Any:
    """Draw the share that passes by strength, one line per layer; without a check, the perplexity.

    With a single strength, draw one line by layer. A dashed line is the unsteered model, and a cross breaks the guard.
    """
    axes = axes_or_new(ax, (6.4, 3.8))
    name = "perplexity" if sweep.unsteered.passed is None else "passed"
    layers = list(dict.fromkeys(row.layer for row in sweep.rows))
    by_layer = len({row.strength for row in sweep.rows}) == 1 and len(layers) > 1
    if by_layer:
        _line(axes, [(row.layer, row) for row in sweep.rows], name, f"strength {sweep.rows[0].strength:g}", "#33658a")
        axes.set_xticks(sorted(layer for layer in layers if layer is not None))
    else:
        from matplotlib import colormaps

        for n, layer in enumerate(layers):
            mine = [(row.strength, row) for row in sweep.rows if row.layer == layer]
            colour = colormaps["viridis"](0.9 * n / max(1, len(layers) - 1))
            _line(axes, [*mine, (0.0, sweep.unsteered)], name, f"layer {layer}", colour)
    base = getattr(sweep.unsteered, name)
    if base is not None:
        axes.axhline(base, color="#888888", linestyle="--", linewidth=1, label="unsteered")
    if any(row.broken and getattr(row, name) is not None for row in sweep.rows):
        axes.plot([], [], color="white", label="breaks the guard", **CROSS)
    axes.set_xlabel("layer" if by_layer else "strength")
    axes.set_ylabel("share that passes" if name == "passed" else name)
    axes.legend(fontsize=8, frameon=False, ncols=1 if len(layers) < 6 else 2)
    tidy(axes)
    return axes


def _line(axes: Any, points: Sequence[tuple[Any, SweepRow]], name: str, label: str, colour: Any) -> None:
    shown = sorted((at, value) for at, row in points if (value := getattr(row, name)) is not None)
    axes.plot([at for at, _ in shown], [value for _, value in shown], "o-", color=colour, markersize=4, label=label)
    broken = [(at, value) for at, row in points if row.broken and (value := getattr(row, name)) is not None]
    axes.plot([at for at, _ in broken], [value for _, value in broken], color=colour, **CROSS)
