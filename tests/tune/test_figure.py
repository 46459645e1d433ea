"""The figure of a search: drawn from any table, the same bytes each time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from trimtab.errors import TrimtabError
from trimtab.report.search import plot_search
from trimtab.tune.candidates import Setting
from trimtab.tune.tune import CandidateResult

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'trimtab[plot]'")
BASE = CandidateResult(None, 8, 0.2, 0.2, 0.0, 3.0, ())


def row(layer, strength, score, operation="add", broken=()):
    return CandidateResult(Setting(layer, strength, "all", operation), 4, score, 0.2, 0.1, 4.0, broken)


@pytest.mark.parametrize(
    "rows",
    [
        [row(3, 1.0, 0.5)],
        [
            row(layer, strength, 0.1 * layer, o)
            for layer in range(8)
            for strength in (0.5, 2)
            for o in ("add", "project")
        ],
        [row(1, 1.0, 0.2), row(2, 1.0, math.nan), row(2, 2.0, 0.9, broken=("perplexity too high: 9, unsteered 3",))],
    ],
    ids=["one", "grid", "holes"],
)
def test_any_table_is_drawn(rows, tmp_path):
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        plot_search([BASE, *rows], file, "JSON")
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture
def figure(monkeypatch):
    """The figure that was drawn last."""
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *rest, **more: (drawn.append(self), save(self, *rest, **more)))
    return drawn


def legend_of(figure):
    return " ".join(text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts())


def test_the_legend_explains_the_marks_that_there_are(figure, tmp_path):
    rows = [row(1, 1.0, 0.5), row(2, 1.0, 0.6)]
    plot_search([BASE, *rows], tmp_path / "a.png", "JSON")
    assert legend_of(figure[-1]) == "0.50 (4): score 0.50 on 4 prompts"
    rows[1] = replace(rows[1], items=8)
    plot_search([BASE, *rows, row(1, 2.0, 0.9, broken=("x",))], tmp_path / "b.png", "JSON", chosen=rows[1].setting)
    shown = legend_of(figure[-1])
    for words in ("frame: the chosen", "hatched: its text broke", "open circle", "empty cell", "only a hint"):
        assert words in shown
    figure[-1].draw_without_rendering()
    box = figure[-1].legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure[-1].bbox.width


def test_operations_with_different_strengths_share_an_axis(figure, tmp_path):
    rows = [row(1, 1.0, 0.5), row(1, 3.0, 0.6), row(1, 2.0, 0.7, "project")]
    plot_search([BASE, *rows], tmp_path / "a.png", "JSON")
    assert [label.get_text() for label in figure[-1].axes[0].get_yticklabels()] == ["1", "2", "3"]
    for axes in figure[-1].axes[:2]:
        low, high = axes.get_ylim()
        assert all(low < text.get_position()[1] < high for text in axes.texts)
    (y,) = (text.get_position()[1] for text in figure[-1].axes[1].texts)
    assert y == 1  # at strength 2


def test_what_the_guard_forbade_looks_different(tmp_path):
    for name, broken in (("a", ()), ("b", ("empty answers: 50%, unsteered 0%",))):
        plot_search([BASE, row(1, 1.0, 0.5), row(2, 1.0, 0.5, broken=broken)], tmp_path / f"{name}.png", "JSON")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_what_was_chosen_has_a_frame(tmp_path):
    rows = [BASE, row(1, 1.0, 0.5), row(2, 1.0, 0.5)]
    plot_search(rows, tmp_path / "a.png", "JSON")
    plot_search(rows, tmp_path / "b.png", "JSON", chosen=rows[1].setting)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_the_verdict_stands_on_it(tmp_path):
    rows = [BASE, row(1, 1.0, 0.5)]
    for name, verdict in (("a", None), ("b", "steer: it works"), ("c", "don't steer: it doesn't")):
        plot_search(rows, tmp_path / f"{name}.png", "JSON", verdict=verdict)
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in "abc"}) == 3


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(TrimtabError, match="nothing to draw"):
        plot_search([BASE], tmp_path / "a.png", "JSON")
    assert not list(tmp_path.iterdir())
