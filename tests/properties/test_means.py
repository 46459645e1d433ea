"""Learning from texts that are read at several positions equals a loop over texts and tokens, in float64."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab import LM, Site
from trimtab.engines.transformers.read import Text
from trimtab.learn.activations import read_activations
from trimtab.learn.contrast import contrast, contrast_many
from trimtab.learn.moments import PairMoments

LAYERS = [0, 2]
MODELS: dict[tuple[str, int], LM] = {}
# grouped-query attention in the first two; the second has a window of 6 tokens, the third learned positions
FAMILIES = ("llama", "gemma3", "gpt2")


def model(family: str, seed: int) -> LM:
    if (family, seed) not in MODELS:
        MODELS[family, seed] = tiny.tiny(family, seed=seed)
    return MODELS[family, seed]


@torch.no_grad()
def naive(lm: LM, text: Text, layer: int) -> list[float]:
    """One text alone, without a cache; the mean is taken number by number."""
    means: list[torch.Tensor] = []
    handle = lm.layout.blocks[layer].register_forward_hook(
        lambda _m, _a, output: means.append((output if isinstance(output, torch.Tensor) else output[0])[0])
    )
    try:
        lm.model(input_ids=torch.tensor([list(text.ids)]), use_cache=False)
    finally:
        handle.remove()
    rows = means[0].double()
    return [sum(float(rows[p, i]) for p in text.positions) / len(text.positions) for i in range(rows.shape[1])]


def expected(lm: LM, pairs: list[tuple[Text, Text]], layer: int) -> PairMoments:
    sides = [torch.tensor([naive(lm, pair[m], layer) for pair in pairs], dtype=torch.float64) for m in (0, 1)]
    moments = PairMoments(lm.layout.width)
    moments.add(*sides)
    return moments


def agree(moments: PairMoments, wanted: PairMoments) -> None:
    assert moments.count == wanted.count
    for name in ("positive_sum", "negative_sum", "unit_sum", "norm_sum"):
        assert torch.allclose(getattr(moments, name), getattr(wanted, name), atol=1e-9, rtol=1e-9), name


@st.composite
def pairs(draw: st.DrawFn) -> list[tuple[Text, Text]]:
    """Answers of different length to prompts that are partly the same, each read at some of its tokens, or all."""
    words = st.integers(3, 80)
    opening = draw(st.lists(words, max_size=12))
    made = []
    for _ in range(draw(st.integers(1, 5))):
        prompt = [*opening, *draw(st.lists(words, min_size=1, max_size=12))]
        sides = []
        for first in (st.integers(3, 40), st.integers(41, 80)):  # so that there is a difference to take the unit of
            answer = [draw(first), *draw(st.lists(words, max_size=8))]
            own = draw(st.lists(words, max_size=4))  # a system prompt of its own, say
            start = len(own) + len(prompt)
            where = draw(st.one_of(st.just(len(answer)), st.integers(1, len(answer))))
            sides.append(Text([*own, *prompt, *answer], range(start, start + where)))
        made.append((sides[0], sides[1]))
    return made


@pytest.mark.long_unless(lambda family: family == "llama")
@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=30)
@given(pairs(), st.integers(0, 2), st.sampled_from([1, 40, 4096]))
def test_moments_of_means_equal_a_loop(family: str, texts: list[tuple[Text, Text]], seed: int, budget: int) -> None:
    lm = model(family, seed)
    moments = contrast(lm, texts, LAYERS, tokens_per_batch=budget)
    many = contrast_many(lm, {"all": texts, "first": texts[:1]}, LAYERS, tokens_per_batch=budget)
    for layer in LAYERS:
        wanted = expected(lm, texts, layer)
        agree(moments[layer], wanted)
        agree(many["all"][layer], wanted)
        agree(many["first"][layer], expected(lm, texts[:1], layer))
    pooled = read_activations(lm, texts, [Site(2)], pooled=True)[Site(2)]
    for pair, values in zip(texts, pooled, strict=True):
        for text, value in zip(pair, values, strict=True):
            assert value.shape == (1, tiny.WIDTH)
            assert value[0].tolist() == pytest.approx(naive(lm, text, 2), rel=1e-9, abs=1e-9)


def test_one_position_is_read_as_it_is() -> None:
    """The mean of one is itself, to the bit: what was learned from last tokens is what it was."""
    lm = model("llama", 0)
    texts = [(Text([3, 4, 5], [2]), Text([3, 4, 6, 7], [3])), (Text([9, 8], [1]), Text([9, 7], [1]))]
    moments = contrast(lm, texts, [1])[1]
    read = read_activations(lm, texts, [Site(1)])[Site(1)]
    raw = PairMoments(lm.layout.width)
    raw.add(*(torch.cat([pair[m] for pair in read]) for m in (0, 1)))
    assert torch.equal(moments.difference, raw.difference)
    assert torch.equal(moments.unit_sum, raw.unit_sum)
