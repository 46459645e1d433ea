"""InstABoost against a naive softmax, its bound, and generation against attention spelled out in loops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import LAYERS, prompt
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimtab import LM, BiasScores, Phrase, Positions, Site, Steering, TrimtabError, instaboost, load, save
from trimtab.decoding.rejection import Rejection
from trimtab.engines.transformers.scores import ScoredRow, compile_scores
from trimtab.steering import Edit

PROMPTS = [prompt(seed, length) for seed, length in ((50, 7), (51, 12), (52, 6))]
PHRASES = [" ".join(text.split()[2:5]) for text in PROMPTS]
NEW = 5


def boosted(scores: Tensor, bias: float, span: tuple[int, int]) -> Tensor:
    """The attention weights `[heads, queries, columns]` that the engine makes of scores of this shape."""
    edit = Edit(Site(0, "scores"), BiasScores(bias), Positions.span(*span))
    width = scores.shape[-1]
    layer = compile_scores([ScoredRow((edit,), width, 0)], width, scores.shape[0], scores.device)[0]
    new = scores[None].clone()
    layer.scale(new, 0)
    layer.shift(new, 0)
    return new[0].softmax(-1)


def multiplied(scores: Tensor, factor: float, span: range) -> Tensor:
    """Version 1, number by number: weights of the span times the factor, then each row divided by its sum."""
    multiplied_scores = torch.empty_like(scores)
    for h, head in enumerate(scores.tolist()):
        for q, row in enumerate(head):
            weights = [math.exp(s) * (factor if c in span else 1.0) for c, s in enumerate(row)]
            multiplied_scores[h, q] = torch.tensor([w / sum(weights) for w in weights], dtype=scores.dtype)
    return multiplied_scores


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("factor", [1.5, 3.0, 19.0])
class TestFormula:
    def scores(self, seed: int) -> Tensor:
        return 3 * torch.randn(4, 5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def test_a_bias_of_ln_m_is_multiplying_weights_by_m(self, seed: int, factor: float) -> None:
        scores = self.scores(seed)
        weights = boosted(scores, math.log(factor), (3, 7))
        torch.testing.assert_close(weights, multiplied(scores, factor, range(3, 7)), rtol=1e-12, atol=1e-14)

    def test_the_bounds_hold(self, seed: int, factor: float) -> None:
        scores, bias = self.scores(seed), math.log(factor)
        before, after = scores.softmax(-1), boosted(scores, bias, (3, 7))
        mass, new = before[..., 3:7].sum(-1), after[..., 3:7].sum(-1)
        torch.testing.assert_close(new, mass * factor / (1 + mass * (factor - 1)), rtol=1e-12, atol=0)
        assert float((new - mass).max()) <= math.tanh(bias / 4) + 1e-12
        assert float((after / before).log().abs().max()) <= bias + 1e-9
        for columns in (slice(3, 7), slice(7, 11)):  # inside and outside, weights keep their ratios
            ratios = [w[..., columns] / w[..., columns].sum(-1, keepdim=True) for w in (before, after)]
            torch.testing.assert_close(ratios[0], ratios[1], rtol=1e-10, atol=0)


def test_the_bound_is_reached() -> None:
    for bias in (0.5, math.log(3), 3.0):
        p = 1 / (1 + math.exp(bias / 2))
        scores = torch.tensor([[[math.log(p), math.log(1 - p)]]], dtype=torch.float64)
        rise = float(boosted(scores, bias, (0, 1))[0, 0, 0]) - p
        assert rise == pytest.approx(math.tanh(bias / 4), rel=1e-12)


@contextmanager
def in_loops(lm: LM, factor: float, span: set[int]) -> Iterator[None]:
    """Attention over one whole text in loops over heads and queries: weights of the span times the factor."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple:
        heads, length = query.shape[1:3]
        repeat = heads // key.shape[1]
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        output = torch.zeros(1, length, heads, value.shape[-1], dtype=value.dtype)
        for q in range(length):
            seen = range(max(0, q + 1 - (options.get("sliding_window") or length)), q + 1)
            for h in range(heads):
                s = [float(key[0, h // repeat, c] @ query[0, h, q]) * scale for c in seen]
                weights = [math.exp(x - max(s)) * (factor if c in span else 1) for c, x in zip(seen, s, strict=True)]
                for c, w in zip(seen, weights, strict=True):
                    output[0, q, h] += w / sum(weights) * value[0, h // repeat, c]
        return output, None

    ALL_ATTENTION_FUNCTIONS.register("test-multiplied", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("test-multiplied", lambda **_: None)
    config = lm.layout.decoder.config
    before, config._attn_implementation = config._attn_implementation, "test-multiplied"
    try:
        yield
    finally:
        config._attn_implementation = before


def naive(lm: LM, text: str, factor: float, span: set[int]) -> list[int]:
    ids = lm.encode(text)
    start = len(ids)
    with torch.no_grad(), in_loops(lm, factor, span):
        for _ in range(NEW):
            ids.append(int(lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


def columns(lm: LM, text: str, phrase: str) -> set[int]:
    return {c for start, stop in lm.spans(text, phrase) for c in range(start, stop)}


@pytest.mark.long_unless(lambda family: family in ("llama", "gemma3"))
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "opt"])
def test_a_mixed_batch_is_each_prompt_alone_in_loops(family: str, tmp_path: Path) -> None:
    """At every layer and head, in the prompt and after it, over a cache, and from a file; and nothing at strength 0."""
    lm = tiny.tiny(family)
    steerings = [instaboost(lm, text, phrase, bias=math.log(8)) for text, phrase in zip(PROMPTS, PHRASES, strict=True)]
    save(steerings[1], tmp_path / "boost.safetensors")
    rows: list[Steering | None] = [steerings[0], load(tmp_path / "boost.safetensors"), None]
    answers = lm.generate(PROMPTS, rows, max_new_tokens=NEW, logprobs=True)
    plain = lm.generate(PROMPTS, max_new_tokens=NEW, logprobs=True)
    for i in (0, 1):
        assert list(answers[i].token_ids) == naive(lm, PROMPTS[i], 8.0, columns(lm, PROMPTS[i], PHRASES[i]))
        assert answers[i].logprobs != plain[i].logprobs
    assert answers[2].logprobs == plain[2].logprobs
    nothing = lm.generate(PROMPTS, [0.0 * steering for steering in steerings], max_new_tokens=NEW, logprobs=True)
    assert [a.logprobs for a in nothing] == [a.logprobs for a in plain]


def test_what_it_is_made_of() -> None:
    lm = tiny.tiny("llama")
    made = instaboost(lm, PROMPTS[1], [Phrase(PHRASES[1]), PROMPTS[1].split()[9]])
    assert [edit.site for edit in made.edits] == [Site(layer, "scores") for layer in range(LAYERS)]
    assert {edit.operation for edit in made.edits} == {BiasScores(math.log(3))}
    assert made.card.method == "instaboost"
    assert len(made.card.options["spans"]) >= 2


def test_rejection_composes() -> None:
    lm = tiny.tiny("llama")
    made = instaboost(lm, PROMPTS[0], PHRASES[0], bias=2.0)
    (strict,) = lm.generate(PROMPTS[0], made, rejection=Rejection(beta=1.0), max_new_tokens=NEW)
    (plain,) = lm.generate(PROMPTS[0], max_new_tokens=NEW)
    assert strict.token_ids == plain.token_ids  # only the raw model's best token is plausible


def test_bad_input() -> None:
    lm = tiny.tiny("llama")
    for bias in (0.0, -1.0):
        with pytest.raises(TrimtabError, match=r"a bias above 0.*take a negative strength"):
            instaboost(lm, PROMPTS[0], PHRASES[0], bias=bias)
    for wrong in (math.inf, math.nan, "3"):
        with pytest.raises(TrimtabError, match="bias is a finite number"):
            instaboost(lm, PROMPTS[0], PHRASES[0], bias=wrong)  # type: ignore[arg-type]
    with pytest.raises(TrimtabError, match="w3 w3 w3"):
        instaboost(lm, PROMPTS[0], "w3 w3 w3")
