"""Draw docs/images/following.png from two reports of `python -m benchmarks following`.

python -m benchmarks following --folder answers --mode without --model … --json without.json
python -m benchmarks following --folder answers --mode with --model … --json with.json
python docs/images/make_following_figure.py without.json with.json docs/images/following.png
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ARMS = {"unsteered": "#b8bec8", "steered": "#1f6feb", "random": "#e8a33d", "said twice": "#7a5195"}
LABELS = {"random": "random directions", "said twice": "instruction said twice"}
NAMES = {
    "number_highlighted_sections": "highlighted sections",
    "response_language": "language",
    "end_checker": "end of the answer",
    "no_comma": "no commas",
    "quotation": "quotation marks",
    "english_lowercase": "lower case",
    "number_bullet_lists": "bullet lists",
    "english_capital": "capitals",
    "constrained_response": "constrained response",
    "json_format": "JSON",
    "capital_word_frequency": "words in capitals",
    "multiple_sections": "sections",
}
CASE = re.compile(r"instruction: [a-z_]+:([a-z_]+) \(n=(\d+); (.*)\)$")
HEIGHT = 0.8


def types_of(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each type of instruction its prompts ("n") and how many of them hold, arm by arm."""
    found: dict[str, dict[str, float]] = {}
    for result in report["results"]:
        match = CASE.search(result["case"])
        if match:
            count = int(match[2])
            mine = found.setdefault(match[1], {"n": count, "steers": float(match[3] != "not steered")})
            mine[result["metric"]] = round(result["value"] * count)
    return found


def draw(without: dict[str, Any], given: dict[str, Any], path: Path) -> None:
    """Bars of prompts that hold, type by type: left without the instruction in the prompt, right with it."""
    reports = [types_of(without), types_of(given)]
    kinds = sorted(reports[0], key=lambda kind: (-reports[0][kind]["n"], kind))
    figure, both = plt.subplots(
        1, 2, figsize=(10, 0.62 * len(kinds) + 1.2), dpi=150, layout="constrained", sharey=True, sharex=True
    )
    titles = ("without the instruction in the prompt", "with it")
    for axes, types, title in zip(both, reports, titles, strict=True):
        for y, kind in enumerate(kinds):
            row = types[kind]
            arms = [arm for arm in ARMS if arm in row and (row["steers"] or arm not in ("steered", "random"))]
            width = HEIGHT / len(ARMS)
            for place, arm in enumerate(arms):
                at = y + (place - (len(arms) - 1) / 2) * width
                axes.barh(at, row[arm], width * 0.92, color=ARMS[arm])
                axes.text(row[arm] + 0.15, at, f"{row[arm]:.0f}", va="center", fontsize=6.5)
        axes.set_title(title, fontsize="medium")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("prompts that hold")
    labels = [f"{NAMES.get(kind, kind)} ({reports[0][kind]['n']:.0f})" for kind in kinds]
    both[0].set_yticks(range(len(kinds)), labels)
    both[0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in ARMS.values()]
    names = [LABELS.get(arm, arm) for arm in ARMS]
    figure.legend(handles, names, loc="outside upper center", ncols=len(ARMS), frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    first, second = (json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:3])
    draw(first, second, Path(sys.argv[3]))
