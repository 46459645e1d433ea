"""A sweep has a row for each layer and strength, whose numbers are those of its answers alone."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from statistics import mean
from typing import Any

import pytest
import tiny
from tiny import LAYERS, direction, prompt

from trimtab import LM, Add, DoseWarning, Edit, Site, Steering, TrimtabError
from trimtab.evaluate.fluency import fluencies
from trimtab.tune import Guard, Sweep
from trimtab.tune.sweep import SweepRow

PROMPTS = [prompt(seed, 4 + seed % 3) for seed in range(3)]
NEW = 6


def pushes(*layers: int) -> Steering:
    return Steering(tuple(Edit(Site(i), Add(direction(i, 4.0))) for i in layers or range(LAYERS)))


def check(text: str) -> bool:
    return len(set(text.split())) > 4


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


@pytest.fixture(scope="module")
def swept(lm: LM) -> Sweep:
    return lm.sweep(
        pushes(), layers=[3, 1], strengths=[1, -2.5], prompts=PROMPTS, check=check, max_new_tokens=NEW, batch_size=5
    )


def test_each_row_is_what_its_steering_does_alone(lm: LM, swept: Sweep) -> None:
    assert [(row.layer, row.strength) for row in swept.rows] == [(3, 1.0), (3, -2.5), (1, 1.0), (1, -2.5)]
    for row in (swept.unsteered, *swept.rows):
        steering = None if row.layer is None else row.strength * pushes(row.layer)
        assert row.steering == steering
        with pytest.warns(DoseWarning) if row.dose > 0.9 else _nothing():
            alone = lm.generate(PROMPTS, steering, max_new_tokens=NEW)
        assert [answer.token_ids for answer in row.answers] == [answer.token_ids for answer in alone]
        read = fluencies(lm, PROMPTS, alone)
        assert row.passed == pytest.approx(mean(check(answer.text) for answer in alone))
        assert row.dose == pytest.approx(mean(answer.applied.dose for answer in alone))
        assert row.repeated == pytest.approx(mean(answer.repeated for answer in read))
        assert row.perplexity == pytest.approx(sorted(answer.perplexity for answer in read)[1])
    assert (swept.unsteered.layer, swept.unsteered.strength, swept.unsteered.dose) == (None, 0.0, 0.0)
    assert len({answer.token_ids for row in swept.rows for answer in row.answers}) > len(PROMPTS)


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_all_rows_share_batches(lm: LM) -> None:
    steps: list[tuple[int, int]] = []
    lm.sweep(
        pushes(),
        strengths=1,
        prompts=PROMPTS,
        max_new_tokens=2,
        batch_size=8,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(8, 15), (15, 15)]


def test_defaults_are_all_layers_and_the_packages_queries(lm: LM) -> None:
    swept = lm.sweep(pushes(0, 2), max_new_tokens=1)
    assert [row.layer for row in swept.rows] == [0, 0, 0, 2, 2, 2]
    assert {row.strength for row in swept.rows} == {0.5, 1.0, 1.5}
    assert len(swept.prompts) == 8
    assert swept.unsteered.passed is None
    with pytest.raises(TrimtabError, match="pass check= to the sweep"):
        swept.best()


def test_a_result_cannot_be_changed(swept: Sweep) -> None:
    with pytest.raises(FrozenInstanceError):
        swept.rows = ()  # type: ignore[misc]


def row(layer: int | None, passed: float, dose: float = 0.2, broken: tuple[str, ...] = ()) -> SweepRow:
    return SweepRow(layer, 1.0 if layer is not None else 0.0, passed, dose, 0.0, 5.0, broken)


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([row(1, 0.5), row(2, 0.75)], 2),
        ([row(1, 0.5), row(2, 1.0, broken=("empty answers",))], 1),
        ([row(1, 0.5, dose=0.3), row(2, 0.5, dose=0.1)], 2),
        ([row(2, 0.5), row(1, 0.5)], 1),
    ],
)
def test_the_best_passes_most_and_breaks_nothing(rows: list[SweepRow], best: int) -> None:
    swept = Sweep(tuple(rows), row(None, 0.25), ("Why?",))
    assert swept.best().layer == best
    assert f'font-weight: bold">{best}<' in swept._repr_html_()


def test_where_nothing_is_better_the_reason_is_said() -> None:
    swept = Sweep((row(1, 0.5), row(2, 1.0, broken=("answers cut off",))), row(None, 0.5), ("Why?",))
    with pytest.raises(TrimtabError, match=r"passes 0.50: of 2 settings 1 break the guard and 1 pass no more often"):
        swept.best()
    assert 'font-weight: bold">unsteered<' in swept._repr_html_()


def test_the_guard_names_what_breaks(lm: LM) -> None:
    options: dict[str, Any] = {"layers": 2, "strengths": [9.0], "prompts": PROMPTS, "max_new_tokens": NEW}
    hard = lm.sweep(pushes(), **options, guard=Guard(perplexity=1.0, certainty=None))
    assert hard.rows[0].perplexity is not None
    assert hard.unsteered.perplexity is not None
    assert bool(hard.rows[0].broken) == (hard.rows[0].perplexity > hard.unsteered.perplexity)
    assert hard.rows[0].broken[0].startswith("perplexity too high")
    assert lm.sweep(pushes(), **options, guard=None).rows[0].broken == ()


def test_a_table_for_pandas(swept: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    table = swept.to_pandas()
    assert list(table.columns) == ["layer", "strength", "passed", "dose", "repeated", "perplexity", "broken"]
    assert table.layer.isna().tolist() == [True, False, False, False, False]
    assert table.layer[1:].tolist() == [3, 3, 1, 1]
    assert table.dose.tolist() == [r.dose for r in (swept.unsteered, *swept.rows)]
    assert table.pivot(index="layer", columns="strength", values="passed").shape == (3, 3)
    del pandas
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(TrimtabError, match="pip install pandas"):
        swept.to_pandas()


def test_a_table_for_notebooks(swept: Sweep) -> None:
    page = swept._repr_html_()
    assert page.count("<tr>") == 6
    assert "3 prompts, 4 settings; bold" in page
    assert ">unsteered<" in page
    bare = replace(
        swept,
        rows=tuple(replace(r, passed=None, perplexity=None) for r in swept.rows),
        unsteered=replace(swept.unsteered, passed=None),
    )
    assert ">passed<" not in bare._repr_html_()
    assert "bold" not in bare._repr_html_()


def test_a_picture(swept: Sweep) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'trimtab[plot]'")
    from matplotlib import pyplot

    axes = swept.plot()
    by_label = {line.get_label(): line for line in axes.lines}
    assert [r.passed for r in swept.rows[:2]] == [by_label["layer 3"].get_ydata()[i] for i in (2, 0)]
    assert list(by_label["layer 1"].get_xdata()) == [-2.5, 0.0, 1.0]
    assert axes.get_ylabel() == "share that passes"
    rows = tuple(replace(r, broken=("repetitive",) if (r.layer, r.strength) == (3, 1) else ()) for r in swept.rows)
    crosses = [
        line for line in replace(swept, rows=rows).plot().lines if line.get_marker() == "X" and len(line.get_xdata())
    ]
    assert [(line.get_color(), list(line.get_xdata())) for line in crosses] == [
        (by_label["layer 3"].get_color(), [1.0])
    ]
    part = Sweep(tuple(r for r in swept.rows if r.strength == 1), swept.unsteered, swept.prompts)
    mine = pyplot.figure().subplots()
    assert part.plot(mine) is mine
    assert mine.get_xlabel() == "layer"
    assert list(mine.lines[0].get_xdata()) == [1, 3]
    pyplot.close("all")


def test_what_cannot_be_swept_says_why(lm: LM) -> None:
    for steering, options, why in (
        (direction(1), {}, "a sweep needs a steering, got Tensor"),
        (Steering(), {}, "no edits"),
        (pushes(1), {"layers": [2]}, "nothing at layer 2; it has layers 1"),
        (pushes(), {"layers": "2"}, "layers are a whole number, or a list"),
        (pushes(), {"layers": []}, "no layer to try"),
        (pushes(), {"strengths": []}, "no strength to try"),
        (pushes(), {"strengths": [0, 1]}, "strength 0 doesn't steer"),
        (pushes(), {"strengths": [math.nan]}, "a strength is a finite number"),
        (pushes(), {"prompts": []}, "there are no prompts"),
        (pushes(), {"check": "capitals"}, "check is a function of an answer's text, got 'capitals'"),
        (pushes(1), {"check": lambda text: None, "strengths": 1}, "this one returned None for"),
        (pushes(), {"num_return_sequences": 2}, "one answer for each prompt"),
    ):
        with pytest.raises(TrimtabError, match=why):
            lm.sweep(steering, **{"prompts": PROMPTS, "max_new_tokens": 1, **options})  # type: ignore[arg-type]
