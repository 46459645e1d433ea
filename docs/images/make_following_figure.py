"""Draw docs/images/following.png from the results in the repository.

python docs/images/make_following_figure.py benchmarks/results docs/images/following.png
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
LABELS = {"random": "random directions", "said twice": "instruction stated twice"}
CASE = re.compile(r"^(.*) \((\d+); ")
BY_TYPE = "Prompts that hold, by type"
HEIGHT = 0.8


def types_of(report: dict[str, Any]) -> dict[str, dict[str, int]]:
    """By type of instruction: the number of prompts, and how many answers follow it in each arm."""
    types: dict[str, dict[str, int]] = {}
    for result in report["results"]:
        match = CASE.search(result["case"])
        if match and result["metric"].startswith(BY_TYPE):
            arm = result["metric"].rsplit(": ", 1)[1]
            types.setdefault(match[1], {"prompts": int(match[2])})[arm] = int(result["value"])
    return types


def draw(without: dict[str, Any], prompted: dict[str, Any], path: Path) -> None:
    """Bars of answers that follow, by type of instruction: left without it in the prompt, right with it."""
    reports = [types_of(without), types_of(prompted)]
    kinds = sorted(reports[0], key=lambda kind: (-reports[0][kind]["prompts"], kind))
    figure, both = plt.subplots(
        1, 2, figsize=(10, 0.62 * len(kinds) + 1.2), dpi=150, layout="constrained", sharey=True, sharex=True
    )
    titles = ("without the instruction in the prompt", "with it")
    for axes, types, title in zip(both, reports, titles, strict=True):
        for y, kind in enumerate(kinds):
            arms = [arm for arm in ARMS if arm in types[kind]]
            width = HEIGHT / len(ARMS)
            for index, arm in enumerate(arms):
                at = y + (index - (len(arms) - 1) / 2) * width
                axes.barh(at, types[kind][arm], width * 0.92, color=ARMS[arm])
                axes.text(types[kind][arm] + 0.15, at, str(types[kind][arm]), va="center", fontsize=6.5)
        axes.set_title(title, fontsize="medium")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("answers that follow the instruction")
    both[0].set_yticks(range(len(kinds)), [f"{kind} ({reports[0][kind]['prompts']})" for kind in kinds])
    both[0].set_ylim(len(kinds) - 0.4, -0.6)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in ARMS.values()]
    figure.legend(handles, [LABELS.get(arm, arm) for arm in ARMS], loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel(_note(reports[1]), x=0.01, ha="left", fontsize=9)
    figure.savefig(path)


def _note(prompted: dict[str, dict[str, int]]) -> str:
    """What a missing bar means, and how stating the instruction twice compares with steering."""
    differences = []
    for counts in prompted.values():
        differences.append(counts["said twice"] - counts.get("steered", counts["unsteered"]))
    more, equal = (sum(map(test, differences)) for test in (lambda d: d > 0, lambda d: d == 0))
    fewer = len(differences) - more - equal
    return (
        "In parentheses: the number of prompts. No bar for steering and random directions: the search chose not to"
        " steer.\nIf the instruction is in the prompt, stating it twice gets more answers right than the search's"
        f" choice for {more} of {len(differences)} types, as many for {equal}, fewer for {fewer}."
    )


if __name__ == "__main__":
    folder, path = (Path(argument) for argument in sys.argv[1:3])
    draw(*(json.loads((folder / f"following-{mode}.json").read_text()) for mode in ("without", "with")), path)
