"""A text projected on a steering's directions: the numbers, the coloured text, the table and the picture."""

from __future__ import annotations

import html
import re

import pytest
import tiny
import torch
from tiny import LAYERS, direction, prompt

from trimtab import LM, Ablate, Add, Edit, Positions, Site, Steering, TrimtabError
from trimtab.report.tokens import token_cosines
from trimtab.text.chat import encode_conversation

TEXT = prompt(4, 7)
TEMPLATE = (
    "{% for m in messages %}{{ '<pad> w5 ' if m.role == 'user' else '<pad> w6 ' }}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<pad> w6{% endif %}"
)


@pytest.fixture(scope="module")
def lm() -> LM:
    made = tiny.tiny("llama")
    made.tokenizer.chat_template = TEMPLATE
    return made


def pushes(*layers: int, strength: float = 1.0) -> Steering:
    return Steering(tuple(Edit(Site(i), Add(direction(i, 3.0)), strength=strength) for i in layers or range(LAYERS)))


def test_the_numbers_are_dot_products_and_cosines(lm: LM) -> None:
    projection = lm.project(TEXT, pushes())
    (read,) = lm.capture(TEXT, list(range(LAYERS)), Positions.all(), chat=False)
    assert projection.layers == tuple(range(LAYERS))
    for layer in projection.layers:
        x, v = read[Site(layer)], direction(layer)
        assert projection.projections[layer] == pytest.approx((x @ v).tolist())
        assert projection.cosines[layer] == pytest.approx((x @ v / x.norm(dim=-1)).tolist())
    assert "".join(projection.tokens) == TEXT
    assert len(projection.tokens) == 7


def test_they_are_those_that_inspect_shows(lm: LM) -> None:
    cosines = token_cosines(lm, pushes(2), TEXT)
    assert lm.project(TEXT, pushes(), 2).cosines == {2: pytest.approx(cosines[0].cosines)}
    assert lm.project(TEXT, pushes(), [0, 3]).layers == (0, 3)
    turned = lm.project(TEXT, pushes(2, strength=-2.0)).cosines[2]
    assert turned == pytest.approx([-cosine for cosine in cosines[0].cosines])


def test_a_direction_is_read_where_it_acts(lm: LM) -> None:
    at = Site(1, "mlp")
    projection = lm.project(TEXT, Steering((Edit(at, Ablate(direction(5))),)))
    (read,) = lm.capture(TEXT, [at], Positions.all(), chat=False)
    assert projection.projections[1] == pytest.approx((read[at] @ direction(5)).tolist())


def test_messages_are_rendered_and_an_answered_conversation_ends_there(lm: LM) -> None:
    question = [{"role": "user", "content": "w10 w11"}]
    answered = [*question, {"role": "assistant", "content": "w12"}]
    assert encode_conversation(lm.tokenizer, question) == lm.encode(question) == [0, 5, 10, 11, 0, 6]
    assert encode_conversation(lm.tokenizer, answered) == [0, 5, 10, 11, 0, 6, 12]
    projection = lm.project(answered, pushes(1))
    assert [token.strip() for token in projection.tokens] == ["<pad>", "w5", "w10", "w11", "<pad>", "w6", "w12"]
    with torch.no_grad():
        hidden = lm.model(input_ids=torch.tensor([[0, 5, 10, 11, 0, 6, 12]]), output_hidden_states=True).hidden_states
    assert projection.projections[1] == pytest.approx((hidden[2][0] @ direction(1)).tolist())


def test_a_notebook_shows_the_text_coloured_once_a_layer(lm: LM) -> None:
    projection = lm.project(TEXT, pushes(), [1, 2])
    page = projection._repr_html_()
    assert re.findall(r">layer (\d)<", page) == ["1", "2"]
    titles = re.findall(r'title="([+-][\d.]+)">([^<]*)</span>', page)
    assert titles == [
        (f"{cosine:+.3f}", html.escape(token))
        for layer in (1, 2)
        for token, cosine in zip(projection.tokens, projection.cosines[layer], strict=True)
    ]
    assert not re.search(r"<script|<style|<img|href|class=", page)


def test_a_table_for_pandas(lm: LM) -> None:
    pytest.importorskip("pandas")
    projection = lm.project(TEXT, pushes(), [1, 2])
    table = projection.to_pandas()
    assert list(table.columns) == ["position", "token", "layer", "cosine", "projection"]
    assert len(table) == 14
    assert tuple(table[table.layer == 2].cosine) == projection.cosines[2]


def test_a_picture(lm: LM) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'trimtab[plot]'")
    from matplotlib import pyplot

    projection = lm.project(TEXT, pushes(1))
    axes = projection.plot()
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(list(projection.cosines[1]))
    mine = pyplot.figure().subplots()
    both = lm.project(TEXT, pushes(), [1, 2])
    assert both.plot(mine) is mine
    assert mine.images[0].get_array().tolist() == [pytest.approx(both.cosines[i]) for i in (1, 2)]
    pyplot.close("all")


def test_what_cannot_be_projected_says_why(lm: LM) -> None:
    for text, steering, layers, why in (
        ("", pushes(), None, "the text is empty"),
        (TEXT, direction(1), None, "projected on a steering, got Tensor"),
        (TEXT, Steering(), None, "no edits"),
        (TEXT, pushes(1), [2], "nothing at layer 2"),
        (TEXT, pushes(1) + pushes(1), None, "several edits"),
        ([TEXT], pushes(1), None, "a message is"),
        (prompt(1, 200), pushes(1), None, "the text"),
    ):
        with pytest.raises(TrimtabError, match=why):
            lm.project(text, steering, layers)  # type: ignore[arg-type]
    with pytest.raises(TrimtabError, match="the text is one string, got list; call this once for each text"):
        token_cosines(lm, pushes(1), [TEXT])  # type: ignore[arg-type]
