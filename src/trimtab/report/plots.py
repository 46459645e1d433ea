"""Plots as PNG. matplotlib is imported only when a plot is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import write_atomically
from trimtab.report.pushes import Push


def check_matplotlib() -> None:
    """Raise `TrimtabError` if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise TrimtabError("pictures need matplotlib: pip install 'trimtab[plot]'") from None


def plot_pushes(pushes: Sequence[Push], path: Path, title: str) -> None:
    """Draw how hard each layer is pushed and, if known, how well the pairs agreed on the direction."""
    check_matplotlib()
    from matplotlib.figure import Figure

    with_agreement = [push for push in pushes if push.agreement is not None]
    figure = Figure(figsize=(7, 4.6 if with_agreement else 3), layout="constrained")
    axes = figure.subplots(2 if with_agreement else 1, 1, sharex=True, squeeze=False)[:, 0]
    push_bars(axes[0], pushes)
    axes[0].set_title(title, loc="left", fontsize=11)
    if with_agreement:
        axes[1].plot(
            [push.layer for push in with_agreement], [push.agreement for push in with_agreement], "o-", color="#b5651d"
        )
        axes[1].set_ylabel("agreement\nof the pairs")
        axes[1].set_ylim(min(0.0, *(push.agreement or 0.0 for push in with_agreement)), 1.02)
    axes[-1].set_xlabel("block")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, metadata={"Software": "trimtab"})
    write_atomically(path, data.getvalue())


def push_bars(axes: Any, pushes: Sequence[Push]) -> None:
    """Draw a bar for each push into matplotlib axes, by layer, in relative norms if all of them are known."""
    from matplotlib.ticker import MaxNLocator

    all_shares_known = all(push.share is not None for push in pushes)
    layers = [push.layer for push in pushes]
    heights = [push.share if push.share is not None and all_shares_known else push.norm for push in pushes]
    width = 0.8 if len(set(layers)) > 3 else 0.2
    for layer in set(layers):  # a sum has several edits at a layer: their bars are side by side
        at = [height for height, where in zip(heights, layers, strict=True) if where == layer]
        places = [layer + width * ((i + 0.5) / len(at) - 0.5) for i in range(len(at))]
        axes.bar(places, at, width=0.96 * width / len(at), color="#33658a")
    axes.set_ylabel("norm of the push\n(in activation norms)" if all_shares_known else "norm of the push")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(min(layers) - 1, max(layers) + 1)
