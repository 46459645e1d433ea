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


def draw(found: dict[str, Any], path: Path) -> None:
    """Two bars for each instruction, with the 95 % interval of each share and of the difference."""
    rows = found["instructions"]
    figure, axes = plt.subplots(figsize=(9, 0.95 * len(rows) + 1.35), dpi=160, layout="constrained")
    for y, row in enumerate(rows):
        for side, colour, shift in (("unsteered", UNSTEERED, -OFFSET), ("steered", STEERED, OFFSET)):
            _bar(axes, row[side], y + shift, colour, side if y == 0 else None)
        difference = [f"{100 * row['difference'][key]:+.0f}" for key in ("estimate", "low", "high")]
        axes.text(112, y, f"{difference[0]} points\n[{difference[1]}, {difference[2]}]", va="center", color=INK)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 132)
    axes.set_xticks(range(0, 101, 25), [f"{share} %" for share in range(0, 101, 25)])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_bounds(0, 100)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(
        f"answers that hold the instruction, of {rows[0]['steered']['of']} unseen prompts (95 % intervals)", x=0.38
    )
    axes.legend(loc="lower right", bbox_to_anchor=(0.78, 1.0), ncols=2, frameon=False)
    axes.set_title(found["model"], loc="left", fontsize="medium", color=INK)
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
