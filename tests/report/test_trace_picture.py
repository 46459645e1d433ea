"""The picture of traces: drawn from any trace, the same bytes each time, and other ones for another trace."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab import TrimtabError
from trimtab.decoding.trace import Step, Trace
from trimtab.report.trace_picture import marks, plot_traces

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'trimtab[plot]'")
RUNGS = ("4 layers at strength 1", "2 layers at strength 1")
STEPS = (
    Step(False, None, None),
    Step(True, 0, 7),
    Step(True, 1, 8),
    Step(True, None, None),
    Step(True, 0, None),
)


def answer(*steps: Step, traced: bool = True) -> Any:
    return SimpleNamespace(trace=Trace(steps, RUNGS, (0, 1), "fused", 9) if traced else None)


def test_a_mark_for_each_open_gate_at_its_rung() -> None:
    assert marks(answer(*STEPS).trace) == [
        (2, 0, "steered", True),
        (3, 1, "weakened", True),
        (4, 2, "rejected", False),
        (5, 0, "steered", False),
    ]


def test_it_shows_the_rung_and_whether_the_token_changed(tmp_path: Path) -> None:
    other_rung = (*STEPS[:2], Step(True, 0, 8), *STEPS[3:])
    unchanged = (STEPS[0], Step(True, 0, None), *STEPS[2:])
    drawn = []
    for number, steps in enumerate((STEPS, STEPS, other_rung, unchanged)):
        file = tmp_path / f"{number}.png"
        plot_traces([answer(*steps), answer(traced=False)], file)
        drawn.append(file.read_bytes())
    assert drawn[0].startswith(b"\x89PNG")
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


def test_a_shut_gate_everywhere_and_many_answers(tmp_path: Path) -> None:
    plot_traces([answer(STEPS[0])] * 20, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("answers", [[], [answer(traced=False)], [answer()]], ids=["none", "no trace", "no token"])
def test_nothing_to_draw(answers: list[Any], tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="nothing to draw"):
        plot_traces(answers, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
