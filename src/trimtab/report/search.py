"""A plot of a search: score by layer and strength, and the settings that broke the guard."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import write_atomically
from trimtab.report.plots import check_matplotlib

if TYPE_CHECKING:
    from trimtab.tune.candidates import Setting
    from trimtab.tune.tune import CandidateResult


BROKEN: dict[str, Any] = {"facecolor": "#e4e4e4", "hatch": "////", "edgecolor": "#b0b0b0", "linewidth": 0}
CHOSEN = "#e08a00"


def plot_search(
    table: Sequence[CandidateResult],
    path: Path,
    title: str,
    *,
    chosen: Setting | None = None,
    verdict: str | None = None,
) -> None:
    """Draw a search's table: above, a map of layer × strength for each operation and positions; below, lines.

    A cell's color is the gain over not steering on the same prompts; its text is the score and, in parentheses, the
    number of prompts. A cell that broke the guard is gray and hatched, whatever its score; one that wasn't tried is
    empty; `chosen` has a frame. Cells with few prompts are no more than a hint. A legend explains all of this.

    Args:
        table: The candidates of the search; "don't steer" is left out of the map.
        path: The PNG to write.
        title: The title of the figure.
        chosen: The setting that the search chose, if any.
        verdict: The result of the search, shown below the title.

    Raises:
        TrimtabError: matplotlib is missing, or nothing was tried.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    rows = [row for row in table if row.setting is not None]
    if not rows:
        raise TrimtabError("nothing was tried, so there is nothing to draw")
    groups: dict[tuple[str, str], list[CandidateResult]] = {}
    for row in rows:
        assert row.setting is not None
        groups.setdefault((row.setting.operation, row.setting.positions), []).append(row)
    layers = sorted({row.setting.layer for row in rows if row.setting})
    strengths = sorted({row.setting.strength for row in rows if row.setting})
    wide = max(4.2, 0.55 * len(layers) + 1.6)
    figure = Figure(figsize=(wide * len(groups) + 0.8, 6.4), layout="constrained")
    axes = figure.subplots(2, len(groups), squeeze=False, sharey="row", height_ratios=[1, 1])
    reach = max(0.1, *(abs(row.score - row.unsteered) for row in rows if _finite(row.score)))
    image: Any = None
    for column, ((operation, positions), members) in enumerate(groups.items()):
        image = _map(axes[0][column], members, layers, strengths, reach, chosen)
        axes[0][column].set_title(f"{operation}, {positions}", fontsize=10)
        _lines(axes[1][column], members, strengths)
        axes[0][column].set_xlabel("block")
        axes[1][column].set_xlabel("block")
        axes[1][column].set_xticks(layers, [str(layer) for layer in layers])
    axes[0][0].set_ylabel("strength")
    axes[1][0].set_ylabel("score")
    bar = figure.colorbar(image, ax=list(axes[0]), shrink=0.85, pad=0.02)
    bar.set_label("gain over not steering", fontsize=9)
    columns = int(11 * figure.get_figwidth())
    head = fill(title, columns) if verdict is None else f"{fill(title, columns)}\n{fill(verdict, columns)}"
    figure.suptitle(head, x=0.01, ha="left", fontsize=11)
    _legend(figure, rows, len(groups) * len(layers) * len(strengths), chosen)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, metadata={"Software": "trimtab"})
    write_atomically(path, data.getvalue())


def _legend(figure: Any, rows: Sequence[CandidateResult], cells: int, chosen: Setting | None) -> None:
    """Explain the marks that the figure has, below it."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    example, counts = rows[0], sorted({row.items for row in rows})
    entries: dict[str, Any] = {}
    if any(row.setting == chosen for row in rows):
        entries["frame: the chosen candidate"] = Patch(facecolor="none", edgecolor=CHOSEN, linewidth=2)
    if any(row.broken for row in rows):
        entries["hatched: its text broke a limit of the guard, so it can't be chosen"] = Patch(**BROKEN)
        marker: dict[str, Any] = {"marker": "o", "linestyle": "none", "color": "#555555", "markerfacecolor": "white"}
        entries["open circle: the same in the plot of scores"] = Line2D([], [], **marker)
    if len(rows) < cells:
        entries["empty cell, no point: not tried"] = Patch(facecolor="white", edgecolor="#b0b0b0")
    number = f"{example.score:.2f} ({example.items}): score {example.score:.2f} on {example.items} prompts"
    few = "; with fewer prompts it was dropped earlier, and its score is only a hint" if len(counts) > 1 else ""
    entries[number + few] = Patch(alpha=0)
    columns = int(13 * figure.get_figwidth()) - 6
    labels = [fill(label, columns) for label in entries]
    figure.legend(list(entries.values()), labels, loc="outside lower left", fontsize=8, frameon=False)


def _map(
    axes: Any,
    rows: Sequence[CandidateResult],
    layers: Sequence[int],
    strengths: Sequence[float],
    reach: float,
    chosen: Setting | None,
) -> Any:
    """Draw cells of layer × strength, evenly spaced and not to scale."""
    import numpy as np
    from matplotlib.patches import Rectangle

    gains = np.full((len(strengths), len(layers)), np.nan)
    for row in rows:
        assert row.setting is not None
        y, x = strengths.index(row.setting.strength), layers.index(row.setting.layer)
        gain = row.score - row.unsteered
        corner = (x - 0.5, y - 0.5)
        if row.broken:
            axes.add_patch(Rectangle(corner, 1, 1, **BROKEN))
        else:
            gains[y, x] = gain
        if row.setting == chosen:
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=CHOSEN, linewidth=3, zorder=3))
        axes.text(
            x,
            y,
            f"{row.score:.2f}\n({row.items})",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if abs(gain) > 0.6 * reach and not row.broken else "#222222",
        )
    image = axes.imshow(gains, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto", origin="lower")
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(strengths)), [f"{strength:g}" for strength in strengths])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _lines(axes: Any, rows: Sequence[CandidateResult], strengths: Sequence[float]) -> None:
    """Draw the score by layer, one line per strength that these rows have; open circles broke the guard."""
    shades = ["#8fb8de", "#33658a", "#14304a", "#b5651d", "#7a3e10", "#555555"]
    for n, strength in enumerate(strengths):
        line = sorted(
            ((row.setting.layer, row) for row in rows if row.setting and row.setting.strength == strength),
            key=lambda pair: pair[0],
        )
        if not line:
            continue
        colour = shades[n % len(shades)]
        axes.plot(
            [x for x, _ in line], [row.score for _, row in line], "-", color=colour, label=f"strength {strength:g}"
        )
        for x, row in line:
            axes.plot(x, row.score, "o", color=colour, markersize=5, markerfacecolor="white" if row.broken else colour)
    furthest = max(rows, key=lambda row: row.items)
    axes.axhline(furthest.unsteered, color="#888888", linestyle="--", linewidth=1, label="don't steer")
    axes.legend(fontsize=7, frameon=False, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
