"""A word by its own logit: what is read and written after the last block, and what becomes of answers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from tiny import WIDTH, naive_edit, prompt
from torch import Tensor

from trimtab import LM, Edit, Positions, ReadWrite, Site, TrimtabError, UnsupportedError, load, save
from trimtab.learn.unembedding import Unembedding, unembedding
from trimtab.methods.word_logit import Spelling, _cap, _include_edits, _steps, _trackable, learn_word_logit

BASE = [prompt(seed, 9) for seed in range(6)]
ASKED = prompt(40, 7)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


@pytest.fixture(scope="module")
def head(lm: LM) -> Unembedding:
    return unembedding(lm, BASE)


def logits(lm: LM, change: Tensor | None = None) -> Tensor:
    """Those after a prompt, less their mean, the last block's output changed by hand: `[vocabulary]`, float64."""
    hook = lm.layout.blocks[-1].register_forward_hook(
        lambda _m, _a, o: o if change is None else (o[0] + change, *o[1:]) if isinstance(o, tuple) else o + change
    )
    with torch.no_grad():
        last_logits = lm.model(input_ids=torch.tensor([lm.encode(ASKED)])).logits[0, -1].double()
    hook.remove()
    return last_logits - last_logits.mean()


def test_rows_are_the_matrix_and_the_norms_gain(lm: LM, head: Unembedding) -> None:
    with torch.no_grad():
        lm.model.model.norm.weight.copy_(torch.linspace(0.5, 2, WIDTH))
        try:
            unembedded = unembedding(lm, BASE)
            matrix = lm.model.lm_head.weight
            naive = (matrix - matrix.mean(0)) * torch.linspace(0.5, 2, WIDTH)
        finally:
            lm.model.model.norm.weight.fill_(1.0)
    assert torch.allclose(unembedded.rows, naive.float(), atol=1e-5)
    assert unembedded.explained == pytest.approx(1, abs=1e-6)
    last = lm.capture(ASKED, [unembedded.site])[0][unembedded.site][0].double()
    read_logits = torch.stack([head.read(token) @ last for token in range(len(head.rows))])
    assert torch.allclose(read_logits * head.typical_scale / last.square().mean().sqrt(), logits(lm), atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_other_norms_are_found_too(family: str) -> None:
    assert unembedding(tiny.tiny(family), BASE).explained > 0.95


def test_what_is_written_moves_its_token_and_the_others_least(lm: LM, head: Unembedding) -> None:
    rows, write = head.rows.double() / head.typical_scale, head.write(70)
    assert float(rows[70] @ write) == pytest.approx(1, abs=1e-6)
    others = lambda d: float((rows @ d).square().mean())  # noqa: E731
    plain = rows[70] / (rows[70] @ rows[70])
    assert others(write) < 0.8 * others(plain)
    small = 1e-3 * head.typical_scale
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):  # no direction of the same effect that is near does less, but for the ridge
        way = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
        way -= (way @ rows[70]) * plain
        assert others(write + small * way / way.norm()) > 0.999 * others(write)
    moved = logits(lm, (3 * write).float()) - logits(lm)
    assert int(moved.argmax()) == 70


def test_a_cap_is_exact_and_leaves_the_rest(head: Unembedding) -> None:
    """Naively in float64: tokens above the mean come to it, no other one of them moves, and where none is, nothing."""
    tokens = [3, 30, 70]
    operation = _cap(head, tokens)
    assert isinstance(operation, ReadWrite)
    read = torch.stack([head.read(token) for token in tokens])
    x = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * head.typical_scale
    before = x @ read.T
    after_x = torch.stack([naive_edit(Edit(head.site, operation), row) for row in x])
    assert torch.allclose(after_x @ read.T, before.clamp(max=0), atol=1e-4 * float(before.abs().max()))
    below = (before <= 0).all(1)
    assert below.any()
    assert torch.equal(after_x[below], x[below])


def test_an_included_word_comes_and_then_nothing_is_pushed(lm: LM, head: Unembedding, tmp_path: Any) -> None:
    steering = learn_word_logit(lm, "w70", first=0.0, last=200.0, tokens=8, head=head)
    (answer,) = lm.generate(ASKED, steering, max_new_tokens=12)
    (bare,) = lm.generate(ASKED, max_new_tokens=12)
    assert 70 not in bare.token_ids
    where = answer.token_ids.index(70)
    assert where <= 9
    assert answer.token_ids[:where] == bare.token_ids[:where]
    rest = [*lm.encode(ASKED), *answer.token_ids[: where + 1]]
    with torch.no_grad():  # from the word on it is the model's own, with what was there before in its cache unsteered
        own = lm.model(input_ids=torch.tensor([rest])).logits[0, -1].argmax()
    assert answer.token_ids[where + 1] == int(own)
    save(steering, tmp_path / "w70.safetensors")
    assert load(tmp_path / "w70.safetensors") == steering
    assert steering.card.options["word"] == "w70"


def test_an_excluded_word_is_gone(lm: LM, head: Unembedding) -> None:
    (bare,) = lm.generate(ASKED, max_new_tokens=12)
    word = bare.token_ids[5]
    steering = learn_word_logit(lm, f"w{word}", exclude=True, head=head)
    (answer,) = lm.generate(ASKED, steering, max_new_tokens=12)
    assert word not in answer.token_ids
    assert steering.edits[0].site == Site(lm.layout.layers - 1)


def test_a_word_of_several_tokens_is_pushed_one_after_the_other(head: Unembedding) -> None:
    edits = _include_edits(head, "harbour", Spelling(" harbour", (10, 11, 12), (" har", " harbo")), _steps(8, 8, 1))
    begin, second, third = edits
    forms = ("harbour", "Harbour")
    lacking = ~(Positions.after(forms[0]) | Positions.at(forms[0]) | Positions.after(forms[1]) | Positions.at(forms[1]))
    assert begin.positions.meanings == lacking.meanings | {Positions.at(" har").rule, Positions.at(" harbo").rule}
    assert (second.positions, third.positions) == (Positions.at(" har") & lacking, Positions.at(" harbo") & lacking)
    assert torch.allclose(second.operation.direction, head.write(11).float())


def test_the_push_grows() -> None:
    steps = _steps(10, 22, 48)
    assert [nats for _, nats in steps] == [10, 12, 14, 16, 18, 20, 22]
    spans = [where.resolve(5) for where, _ in steps]
    assert spans[0] == ((4, 12),)
    assert spans[-1] == ((52, None),)
    assert all(a[0][1] == b[0][0] for a, b in pairwise(spans))


@pytest.mark.parametrize(
    ("word", "options", "words"),
    [
        (" ", {}, "can't be empty"),
        ("two words", {}, "more than one word"),
        ("w70", {"first": 9.0, "last": 3.0}, "doesn't decrease"),
        ("w70", {"tokens": 0}, "one token or more"),
    ],
)
def test_bad_input(lm: LM, word: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(TrimtabError, match=words):
        learn_word_logit(lm, word, base=BASE, **options)


def test_logits_that_are_made_otherwise_are_refused() -> None:
    lm = tiny.tiny("llama")
    lm.model.lm_head.register_forward_hook(lambda _m, _a, o: o.flip(-1))
    with pytest.raises(UnsupportedError, match="can't be predicted from its output embeddings"):
        learn_word_logit(lm, "w70", base=BASE)


def test_no_spelling_is_named_that_isnt_kept_out() -> None:
    """More than can be followed in one answer: the last are left out of the edits and of the card alike."""
    short = Spelling(" a", (1,), ())
    longer = [Spelling(f" b{i}", (2 + i, 9), (f"b{i}",)) for i in range(8)]
    assert _trackable([longer[0], short, *longer[1:]]) == [longer[0], short, *longer[1:6]]
