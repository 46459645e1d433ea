"""Draw docs/images/demo.png from what `trimtab demo --json` prints.

trimtab demo --json > demo.json
python docs/images/make_demo_figure.py demo.json docs/images/demo.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

UNSTEERED, STEERED, INK = "#b8bec8", "#1f6feb", "#24292f"
OFFSET = 0.19


REGIMES = {"without": "nothing said in the prompt", "with": "the instruction said in the prompt"}


def draw(found: dict[str, Any], path: Path) -> None:
    """A panel a regime; in each two bars for each instruction, with the 95 % interval of each share."""
    rows = found["instructions"]
    figure, panels = plt.subplots(
        1, 2, figsize=(10, 0.95 * len(rows) + 1.35), dpi=160, layout="constrained", sharey=True
    )
    for axes, (regime, title) in zip(panels, REGIMES.items(), strict=True):
        for y, row in enumerate(rows):
            for side, colour, shift in (("unsteered", UNSTEERED, -OFFSET), ("steered", STEERED, OFFSET)):
                _bar(axes, row[regime][side], y + shift, colour, side if y == 0 else None)
        axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
        axes.set_xlim(0, 124)
        axes.set_xticks(range(0, 101, 25), [f"{share} %" for share in range(0, 101, 25)])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_bounds(0, 100)
        axes.tick_params(axis="y", length=0)
        axes.set_title(title, loc="left", fontsize="medium", color=INK)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    of = rows[0]["with"]["steered"]["of"]
    figure.suptitle(f"{found['model']}: answers of {of} that follow the instruction", x=0.01, ha="left", color=INK)
    figure.savefig(path)


def _bar(axes: Any, side: dict[str, Any], y: float, colour: str, label: str | None) -> None:
    share, low, high = (100 * side["share"][key] for key in ("estimate", "low", "high"))
    axes.barh(y, share, height=2 * OFFSET - 0.02, color=colour, label=label)
    axes.plot([low, high], [y, y], color=INK, linewidth=1.2)
    axes.text(max(high, share) + 1.5, y, f"{side['holds']} of {side['of']}", va="center", color=INK, fontsize="small")


def _label(row: dict[str, Any]) -> str:
    return row["shown"].replace(" in <<", "\nin <<")


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
