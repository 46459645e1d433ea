"""Pictures on matplotlib's axes, for notebooks: drawn into the axes that they are given, or into new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError
from trimtab.report.plots import check_matplotlib

if TYPE_CHECKING:
    from trimtab.steering import Steering


def axes_or_new(ax: Any, size: tuple[float, float] = (6.4, 3.2)) -> Any:
    """The axes that were given, or those of a new figure of so many inches, which a notebook then shows.

    Raises:
        TrimtabError: matplotlib is missing, or what was given are no axes.
    """
    check_matplotlib()
    if ax is not None:
        if not hasattr(ax, "bar") or not hasattr(ax, "set_xlabel"):
            raise TrimtabError(f"ax is one of matplotlib's Axes, got {type(ax).__name__}; leave it out for new ones")
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, layout="constrained")[1]


def tidy(axes: Any) -> None:
    """No frame but the axes themselves, and a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def draw_steering(steering: Steering, ax: Any = None) -> Any:
    """Bars of how hard each layer is pushed; edits at one layer stand beside each other.

    Raises:
        TrimtabError: matplotlib is missing, the steering has no edits, or it steers attention, which has no direction.
    """
    from trimtab.report.described import origin
    from trimtab.report.plots import push_bars
    from trimtab.report.pushes import pushes

    if not steering.edits:
        raise TrimtabError("this steering has no edits, so there is nothing to draw")
    found = pushes(steering)
    axes = axes_or_new(ax)
    push_bars(axes, found)
    axes.set_xlabel("layer")
    axes.set_title(origin(steering.card), loc="left", fontsize=11, parse_math=False)
    tidy(axes)
    return axes
