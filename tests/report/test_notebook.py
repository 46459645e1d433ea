"""What a notebook shows of a steering, a card and an answer."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import tiny
from tiny import LAYERS, direction, prompt

from trimtab import LM, Add, Card, Edit, Rejection, Site, Steering, TrimtabError
from trimtab.engines.answer import Applied, Generation

matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'trimtab[plot]'")


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    from matplotlib import pyplot

    pyplot.close("all")


NOTHING = Card()


def vectors(scale: float = 3.0, *, card: Card = NOTHING) -> Steering:
    return Steering(tuple(Edit(Site(i), Add(direction(i, scale * (1 + i)))) for i in range(LAYERS)), card)


class Balanced(HTMLParser):
    """Sees that every tag that opens is closed in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> str:
    """The text of the HTML, which must be whole and have nothing in it that runs or is fetched."""
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert not re.search(r"<script|<img|href|url\(", page)
    return parser.text


def test_a_steering_has_the_table_that_inspect_prints() -> None:
    measured = {"activation_norm": {"0": 30.0, "1": 60.0, "2": 90.0, "3": 120.0}, "agreement": {"0": 0.5}}
    page = vectors(card=Card("caa <b>", measured=measured))._repr_html_()
    text = read(page)
    assert "caa <b>" in text
    assert "4 edits: operation add, at from-last-prompt-token, strength 1" in text
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert [cells[i] for i in (0, 1, 3, 4)] == ["0", "3", "10%", "0.50"]
    assert [int(width) for width in re.findall(r"width: (\d+)px", page)] == [30, 60, 90, 120]


def test_steerings_that_push_in_no_direction_are_shown_too(lm: LM) -> None:
    assert "it does nothing" in read(Steering()._repr_html_())
    towards = Steering((*Steering().edits, *_emphasis(lm).edits))
    assert read(towards._repr_html_()).count("scores[") == LAYERS


def _emphasis(lm: LM) -> Steering:
    from trimtab.steering import ScaleScores, emphasis

    return emphasis(ScaleScores(), ((1, 3),), range(LAYERS), "directer")


def test_a_card_and_its_parts(lm: LM) -> None:
    card = Card("caa", lm.identity, "d1", {"layers": [1, 2], "read_at": "<last>"}, {"pairs": 7})
    text = read(card._repr_html_())
    for said in ("caa on tiny-llama", "4 layers, width 32", "d1 (7 pairs)", "1, 2", "<last>"):
        assert said in text
    both = vectors(card=card) + vectors(card=Card("repe"))
    assert "part 2methodrepe" in read(both.card._repr_html_())


def test_an_answer_with_its_doses(lm: LM) -> None:
    (plain,) = lm.generate(prompt(1, 5), max_new_tokens=4)
    assert plain.pieces is None
    assert plain.text in read(plain._repr_html_())
    assert "unsteered" in read(plain._repr_html_())
    (steered,) = lm.generate(prompt(1, 5), vectors(0.01), max_new_tokens=4)
    text = read(steered._repr_html_())
    assert "4 tokens, cut off by the token limit" in text
    assert f"residual[2]{steered.applied.doses[2].ratio:.3g}" in text
    assert "and 2 more" in text


def test_tokens_are_coloured_by_their_probability(lm: LM) -> None:
    (answer,) = lm.generate(prompt(2, 5), max_new_tokens=5, logprobs=True)
    assert answer.pieces is not None
    assert answer.logprobs is not None
    assert len(answer.pieces) == 5
    assert "".join(answer.pieces) == answer.text
    sure = replace(answer, logprobs=(0.0, *answer.logprobs[1:]))
    page = sure._repr_html_()
    assert answer.text in read(page)
    alphas = [float(alpha) for alpha in re.findall(r"rgba\(184,62,48,([\d.]+)\)", page)]
    assert len(alphas) == 5
    assert alphas[0] == 0
    assert all(alpha > 0 for alpha in alphas[1:])


def test_tokens_are_coloured_by_what_rejection_did(lm: LM) -> None:
    (answer,) = lm.generate(prompt(3, 5), vectors(0.5), max_new_tokens=8, rejection=Rejection(beta=1e-9))
    assert answer.trace is not None
    assert answer.pieces is not None
    page = answer._repr_html_()
    assert answer.text in read(page)
    spans = re.findall(r"<span style=\"background: ([^;\"]+)(; border[^\"]*)?\" title=\"candidate", page)
    assert len(spans) == sum(step.open and step.candidate is not None for step in answer.trace.steps) > 0
    assert sum(bool(line) for _, line in spans) == sum(step.replaced is not None for step in answer.trace.steps)


def test_text_of_an_answer_cannot_become_markup() -> None:
    text = "<script>alert(1)</script>"
    answer = Generation(text, (1, 2), "stop", 3, Applied((), ()), (-1.0, 0.0), None, (text[:5], text[5:]))
    page = answer._repr_html_()
    assert html.escape(text[:5]) in page
    assert text in read(page)


HOSTILE = "<script>alert('x')</script> & <b>"


def test_whatever_is_in_it_every_kind_is_whole_and_escapes_its_text() -> None:
    from trimtab.report.projections import Projections
    from trimtab.tune.sweep import Sweep, SweepRow

    card = Card(HOSTILE, None, HOSTILE, {HOSTILE: HOSTILE, "list": [HOSTILE, 2]}, {HOSTILE: {HOSTILE: 1}})
    row = SweepRow(1, 0.5, 0.5, 0.1, 0.0, None, (HOSTILE,))
    shown = [
        vectors(card=card),
        card,
        Card("sum", parts=(card, card)),
        Generation(HOSTILE, (1,), "stop", 3, Applied((HOSTILE,), ()), (-1.0,), None, (HOSTILE,)),
        Generation(HOSTILE, (1,), "stop", 3, Applied((HOSTILE,), ())),
        Sweep((row,), SweepRow(None, 0.0, 0.1, 0.0, 0.0, 2.0), (HOSTILE,)),
        Projections((HOSTILE, "b"), {1: (0.5, 0.1)}, {1: (5.0, 1.0)}),
    ]
    for result in shown:
        page = result._repr_html_()
        assert HOSTILE in read(page), result
        assert "<script" not in page


def test_a_stream_shows_what_there_is_of_it(lm: LM) -> None:
    stream = lm.stream(prompt(1, 5), vectors(0.01), max_new_tokens=4)
    first = next(stream)
    assert read(stream._repr_html_()) == f"{first}running"
    assert "".join([first, *stream]) == stream.result.text
    assert stream._repr_html_() == stream.result._repr_html_()
    cut = lm.stream(prompt(1, 5), max_new_tokens=4)
    begun = next(cut)
    cut.close()
    assert read(cut._repr_html_()) == f"{begun}stopped"


def test_values_of_a_card_are_short() -> None:
    layers, doses = list(range(3, 30)), {str(i): 0.05 + i / 100 for i in range(30)}
    text = read(Card("x", options={"layers": layers}, measured={"doses": doses, "holds": True})._repr_html_())
    for said in ("layers3-29", "doses0.05 to 0.34 (of 30)", "holdsyes"):
        assert said in text
    odd = read(Card("x", options={"layers": [1, 3], "part": {"a": 1, "b": "two"}})._repr_html_())
    assert "layers1, 3" in odd
    assert "parta: 1, b: two" in odd


def test_a_sweep_that_breaks_nothing_has_no_column_for_it() -> None:
    from trimtab.tune.sweep import Sweep, SweepRow

    rows = [SweepRow(1, 0.5, None, 0.1, 0.0, 2.0), SweepRow(2, 0.5, None, 0.1, 0.0, 2.0, ("repetition",))]
    base = SweepRow(None, 0.0, None, 0.0, 0.0, 2.0)
    assert "breaks" not in read(Sweep((rows[0],), base, ("a",))._repr_html_())
    assert "breaks" in read(Sweep(tuple(rows), base, ("a",))._repr_html_())


def test_the_plot_has_a_bar_for_each_edit() -> None:
    axes = vectors(card=Card("caa")).plot()
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([3, 6, 9, 12])
    assert (axes.get_xlabel(), axes.get_title(loc="left")) == ("layer", "caa")
    figure = matplotlib.figure.Figure()
    mine = figure.subplots()
    assert (vectors() + vectors()).plot(mine) is mine
    assert len(mine.patches) == 2 * LAYERS


def test_cosines_have_a_table_a_frame_and_a_plot() -> None:
    pandas = pytest.importorskip("pandas")
    first = vectors()
    second = Steering((Edit(Site(1), Add(-2 * direction(1))), Edit(Site(3), Add(direction(3)))))
    cosines = first.cosine(second)
    assert cosines == {1: pytest.approx(-1.0), 3: pytest.approx(1.0)}
    page = cosines._repr_html_()
    assert "1-1.000" in read(page)
    assert "3+1.000" in read(page)
    assert re.findall(r"width: 120px.*?background: rgba\((\d+),", page) == ["184", "51"]
    table = cosines.to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert table.to_dict("list") == {"layer": [1, 3], "cosine": list(cosines.values())}
    axes = matplotlib.figure.Figure().subplots()
    assert cosines.plot(axes) is axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([-1.0, 1.0])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "cosine")


def test_a_steering_is_a_data_frame_with_a_row_per_edit(lm: LM) -> None:
    pytest.importorskip("pandas")
    measured = {"activation_norm": {"0": 30.0}, "agreement": {"0": 0.5}}
    steering = Steering((*vectors().only([0, 2]).edits, *_emphasis(lm)[1].edits), Card("caa", measured=measured))
    table = steering.to_pandas()
    assert list(table.columns) == [
        *("layer", "site", "operation", "positions", "gate", "strength"),
        *("norm", "share", "agreement"),
    ]
    assert table.layer.tolist() == [0, 2, 1]
    assert table.operation.tolist() == ["add", "add", "scale_scores"]
    assert table.norm[:2].tolist() == pytest.approx([3.0, 9.0])
    assert table.share[0] == pytest.approx(0.1)
    assert table.agreement[0] == 0.5
    assert table[["share", "agreement"]].isna().values.tolist() == [[False, False], [True, True], [True, True]]
    assert table.norm.isna().tolist() == [False, False, True]


def test_what_cannot_be_drawn_says_why(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrimtabError, match="no edits"):
        Steering().plot()
    with pytest.raises(TrimtabError, match="steers attention"):
        _emphasis(lm).plot()
    with pytest.raises(TrimtabError, match="one of matplotlib's Axes, got str"):
        vectors().plot("ax")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(TrimtabError, match=r"pip install 'trimtab\[plot\]'"):
        vectors().plot()
