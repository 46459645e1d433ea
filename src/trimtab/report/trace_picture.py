"""A plot of traces: for each answer, what rejection did at each token, candidate by candidate."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.decoding.trace import Trace
from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import write_atomically
from trimtab.report.plots import check_matplotlib
from trimtab.report.traces import kind_of

if TYPE_CHECKING:
    from trimtab.engines.transformers.generate import Generation

COLOURS = {"steered": "#3f8f3c", "weakened": "#d9a514", "rejected": "#c8452f"}
MOST = 12


def plot_traces(answers: Sequence[Generation], path: Path) -> None:
    """Draw the traces of answers below each other, with tokens from left to right and one line per candidate.

    Each token at which steering was tried has a mark: at the accepted candidate, or at the bottom if all were rejected.
    It is filled if the token differs from the unsteered model's. Only the first 12 traces are drawn.

    Raises `TrimtabError` if matplotlib is missing, or no answer has a trace with a token in it.
    """
    check_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    traces = [answer.trace for answer in answers if answer.trace is not None and answer.trace.steps]
    if not traces:
        raise TrimtabError("no answer has a trace, so there is nothing to draw; generate with rejection")
    shown = traces[:MOST]
    heights = [0.7 + 0.26 * (len(trace.candidates) + 1) for trace in shown]
    figure = Figure(figsize=(9, sum(heights) + 0.5), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, trace in zip(panels, shown, strict=True):
        _draw(axes, trace)
    panels[-1].set_xlabel("token; filled: different from the unsteered model's")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlim(0, max(len(trace.steps) for trace in shown) + 1)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, metadata={"Software": "trimtab"})
    write_atomically(path, data.getvalue())


def marks(trace: Trace) -> list[tuple[int, int, str, bool]]:
    """`(token from 1, line from 0, kind, changed)` where steering was tried; the last line is "all rejected"."""
    return [
        (
            number,
            len(trace.candidates) if step.candidate is None else step.candidate,
            kind_of(step),
            step.replaced is not None,
        )
        for number, step in enumerate(trace.steps, 1)
        if step.open
    ]


def _draw(axes: Any, trace: Trace) -> None:
    labels = [*trace.candidates, "all rejected"]
    for number, line, kind, changed in marks(trace):
        colour = COLOURS[kind]
        axes.plot(number, line, "o", markersize=5, markeredgecolor=colour, color=colour if changed else "white")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the strongest at the top
    share = f"steering tried at {trace.open_share:.0%} of {len(trace.steps)} tokens, {trace.changed_share:.0%} changed"
    axes.set_title(share, loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
