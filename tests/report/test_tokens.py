from __future__ import annotations

import html
import re
from typing import Any

import pytest
import tiny
import torch
from tiny import LAYERS, WIDTH, direction, prompt

from trimtab import LM, Add, Edit, Positions, SetProjection, Site, Steering, TrimtabError
from trimtab.report.sweep import (
    directions,
    draw_similarity,
    similarity,
    similarity_between,
)
from trimtab.report.tokens import (
    TokenCosines,
    color_limit,
    coloured_cosines,
    draw_tokens,
    token_cosines,
    tokens_page,
)

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'trimtab[plot]'")
PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


def vectors(seed: int, layers: range = range(LAYERS), strength: float = 1.0) -> Steering:
    return Steering(tuple(Edit(Site(i), Add(direction(seed + i, 3.0)), strength=strength) for i in layers))


def cosines_of(cosines: list[float], layer: int = 0) -> TokenCosines:
    return TokenCosines(layer, tuple(f" t{i}" for i in range(len(cosines))), tuple(cosines))


# ---- cosines of a text's tokens ------------------------------------------------------------------------------


def test_cosines_are_those_of_each_token_alone(lm: LM) -> None:
    text = prompt(1, 7)
    cosines = token_cosines(lm, vectors(1), text)
    assert [each.layer for each in cosines] == list(range(LAYERS))
    read: list[torch.Tensor] = []
    for block in lm.layout.blocks:
        block.register_forward_hook(lambda _m, _a, o: read.append(o[0]))
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([lm.encode(text)]), use_cache=False)
    for block in lm.layout.blocks:
        block._forward_hooks.clear()
    for each in cosines:
        x, v = read[each.layer], direction(1 + each.layer)
        expected = [float(torch.dot(x[t], v) / (x[t].norm() * v.norm())) for t in range(7)]
        assert list(each.cosines) == pytest.approx(expected, abs=1e-9)
        assert "".join(each.pieces) == text


def test_layers_and_signs(lm: LM) -> None:
    text = prompt(2, 4)
    (only,) = token_cosines(lm, vectors(1), text, [2])
    assert only == token_cosines(lm, vectors(1), text)[2]
    (turned,) = token_cosines(lm, -2.0 * vectors(1), text, [2])
    assert turned.cosines == pytest.approx([-c for c in only.cosines])


def test_the_text_is_read_unsteered(lm: LM) -> None:
    """The direction of layer 0 would change what layer 3 reads, were it added."""
    (alone,) = token_cosines(lm, vectors(1, range(3, 4)), prompt(3, 5))
    assert alone == token_cosines(lm, vectors(1), prompt(3, 5))[3]


def test_what_cant_be_read(lm: LM) -> None:
    with pytest.raises(TrimtabError, match="the text is empty"):
        token_cosines(lm, vectors(1), "")
    with pytest.raises(TrimtabError, match="nothing at layer 7"):
        token_cosines(lm, vectors(1), "w3", [7])
    with pytest.raises(TrimtabError, match="several edits"):
        token_cosines(lm, vectors(1) + vectors(2), "w3")
    with pytest.raises(TrimtabError, match="width is 33"):
        token_cosines(lm, Steering((Edit(Site(1), Add(torch.ones(WIDTH + 1))),)), "w3")


def test_the_first_token_does_not_set_the_scale() -> None:
    assert color_limit([cosines_of([0.9, -0.2, 0.1]), cosines_of([0.9, 0.05, 0.3])]) == 0.3
    assert color_limit([cosines_of([0.9])]) == 0.9
    assert color_limit([cosines_of([0.9, 0.0])]) > 0


def test_the_terminal_has_the_text_and_the_signs_colours() -> None:
    text = coloured_cosines(cosines_of([0.0, 0.4, -0.4, 0.2]), 0.4)
    assert text.plain == " t0 t1 t2 t3"
    colours = [span.style.bgcolor.triplet for span in text.spans]  # type: ignore[union-attr]
    assert colours[0] == (255, 255, 255)
    assert colours[1].blue > colours[1].red
    assert colours[2].red > colours[2].blue
    assert colours[1].red < colours[3].red < colours[0].red  # half the cosine, a lighter colour


def test_the_page_has_the_text_escaped_and_nothing_from_elsewhere() -> None:
    rows = [TokenCosines(2, ("a", " <b>", ' "c"\n', "", "d"), (0.1, 0.2, -0.2, 0.0, 0.1))]
    page = tokens_page(rows, "<title> & more")
    shown = re.search(r'<p class="text">(.*)</p>', page, re.DOTALL)
    assert shown is not None
    assert html.unescape(re.sub(r"<[^>]*>", "", shown[1])) == 'a <b> "c"\nd'
    assert "<title> & more" not in page
    assert 'title="-0.200"' in page
    assert '<meta name="viewport" content="width=device-width">' in page
    assert not re.search(r"https?://|<script|<link", page)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("tokens", [1, 36, 80])
def test_pictures_of_any_length(layers: int, tokens: int) -> None:
    rows = [cosines_of([0.5, *(i % 7 / 20 - 0.15 for i in range(tokens - 1))], layer) for layer in range(layers)]
    assert draw_tokens(rows, "cosine with $x and more").startswith(PNG)


# ---- similarity ----------------------------------------------------------------------------------------------


def test_similarity_of_two_steerings() -> None:
    a, b = vectors(1, range(1, 3)), vectors(1, range(0, 4), strength=-2.0)
    layers, across, cosines = similarity_between(a, b)
    assert (layers, across) == ([1, 2], [0, 1, 2, 3])
    for n, i in enumerate(layers):
        for m, j in enumerate(across):
            assert float(cosines[n, m]) == pytest.approx(-float(direction(1 + i) @ direction(1 + j)), abs=1e-6)
    assert float(cosines[0, 1]) == pytest.approx(-1)


def test_other_operations_and_orders() -> None:
    edits = tuple(Edit(Site(i), SetProjection(direction(1 + i), target=1.0)) for i in (3, 1))
    assert list(directions(Steering(edits))) == [1, 3]
    _, across, cosines = similarity_between(vectors(1), Steering(edits))
    assert across == [1, 3]
    assert float(cosines[1, 0]) == pytest.approx(1)


def test_what_cant_be_compared() -> None:
    wide = Steering((Edit(Site(1), Add(torch.ones(WIDTH + 1))),))
    with pytest.raises(TrimtabError, match="width 32 and 33"):
        similarity_between(vectors(1), wide)
    with pytest.raises(TrimtabError, match="several edits"):
        similarity_between(vectors(1) + vectors(1), vectors(1))
    with pytest.raises(TrimtabError, match="layer 1 has no direction"):
        similarity(Steering((Edit(Site(1), Add(torch.zeros(WIDTH)), Positions.all()),)))


def test_pictures_of_similarity() -> None:
    layers, cosines = similarity(vectors(1))
    assert torch.allclose(cosines.diagonal(), torch.ones(LAYERS, dtype=torch.float64))
    assert draw_similarity(layers, cosines, "one").startswith(PNG)
    layers, across, cosines = similarity_between(vectors(1), vectors(5, range(2)))
    assert draw_similarity(layers, cosines, "two", across=across, names=("a$b", "c_d")).startswith(PNG)


def test_pictures_hold_their_legend_and_no_share_below_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """One plane is narrow, for four names beside each other; and a small share stands at the foot of its axis."""
    from trimtab.evaluate.intervals import Interval
    from trimtab.report import sweep

    monkeypatch.setattr(sweep, "as_png", lambda figure: figure)
    figure: Any = sweep.draw_planes({1: torch.randn(4, 2, 8)}, [("A", "B"), ("B", "A")] * 2, "a title")
    figure.canvas.draw()
    inside, (legend,) = figure.bbox, figure.legends
    box = legend.get_window_extent()
    assert inside.x0 <= box.x0 < box.x1 <= inside.x1
    few = Interval(0.004, 0.001, 0.008)
    drawn: Any = sweep.draw_sweep([sweep.Cell(1, strength, few) for strength in (-1.0, 1.0)], few, "a title", "mass")
    bottom, top = drawn.axes[0].get_ylim()
    assert -0.01 < bottom < 0
    assert top - bottom == pytest.approx(sweep.SPAN)


def test_of_many_layers_those_that_change_the_score_most_are_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.evaluate.intervals import Interval
    from trimtab.report import sweep

    monkeypatch.setattr(sweep, "as_png", lambda figure: figure)
    base = Interval(0.5, 0.4, 0.6)
    change = {1: 0.01, 2: -0.2, 3: 0.3, 4: 0.02, 5: 0.1, 6: 0.15}
    cells = [
        sweep.Cell(layer, s, Interval(0.5 + s * by, 0.4 + s * by, 0.6 + s * by))
        for layer, by in change.items()
        for s in (0.5, 1.0)
    ]
    figure: Any = sweep.draw_sweep(cells, base, "a title", "p(matching)")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["2 other layers", "unsteered", "layer 2", "layer 3", "layer 5", "layer 6"]
    few: Any = sweep.draw_sweep(cells[:4], base, "a title", "p(matching)")
    labels = [text.get_text() for text in few.axes[0].get_legend().get_texts()]
    assert labels == ["unsteered", "layer 1", "layer 2", "95 % interval"]
