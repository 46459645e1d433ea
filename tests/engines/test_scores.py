"""Edits of attention scores at every token, without rejection: in the prompt as well as in decoding."""

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

from trimtab import LM, Steering, TrimtabError, load, save
from trimtab.engines.transformers.scores import ScoredRow, compile_scores
from trimtab.errors import UnsupportedError
from trimtab.methods.directer import directer
from trimtab.methods.pasta import pasta
from trimtab.methods.spotlight import spotlight
from trimtab.steering import BiasScores, Edit, Positions, ScaleScores, ScoreOperation, Site, TargetMass, emphasis

PROMPTS = [prompt(seed, length) for seed, length in enumerate((9, 14, 6))]
SPANS = [((2, 5),), ((3, 4), (6, 9)), ((0, 2),)]
OPERATIONS: dict[str, ScoreOperation] = {
    "scaling": ScaleScores(3.0),
    "pasta": BiasScores(math.log(0.01), heads=(0, 2), outside=True),
    "boost": BiasScores(2.0),
    "spotlight": TargetMass(0.6),
    "spotlight by layer": TargetMass(0.5, pool="layer"),
    "exact": TargetMass(0.6, exact=True),
}
NEW = 4


def weights_after(operation: ScoreOperation, scores: Tensor, span: tuple[int, int], strength: float = 1.0) -> Tensor:
    """The attention weights `[heads, queries, columns]` of one prompt, for raw scores of the same shape."""
    edit = Edit(Site(0, "scores"), operation, Positions.span(*span), strength)
    width = scores.shape[-1]
    layers = compile_scores([ScoredRow((edit,), width, 0)], width, scores.shape[0], scores.device)
    new = scores[None].clone()
    layers[0].scale(new, 0)
    layers[0].shift(new, 0)
    return new[0].softmax(-1)


@pytest.fixture(params=range(3))
def scores(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(4, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(request.param)) * 2


class TestFormulas:
    def test_the_bias_of_pasta_is_multiplying_weights_and_dividing_by_their_sum(self, scores: Tensor) -> None:
        raw = scores.softmax(-1)
        factor = torch.full((10,), 0.01, dtype=torch.float64)
        factor[2:5] = 1
        expected = raw * factor
        expected /= expected.sum(-1, keepdim=True)
        weights = weights_after(BiasScores(math.log(0.01), outside=True), scores, (2, 5))
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)

    def test_only_the_chosen_heads(self, scores: Tensor) -> None:
        weights = weights_after(BiasScores(2.0, heads=(1, 3)), scores, (2, 5))
        for head in range(4):
            assert torch.equal(weights[head], scores.softmax(-1)[head]) == (head in (0, 2))

    def test_the_mass_after_spotlight(self, scores: Tensor) -> None:
        before = scores.softmax(-1)[..., 2:5].sum(-1)
        after = weights_after(TargetMass(0.4), scores, (2, 5))[..., 2:5].sum(-1)
        expected = torch.where(before < 0.4, 0.4 / (1.4 - before), before)
        torch.testing.assert_close(after, expected, rtol=1e-10, atol=1e-12)
        assert bool((before < 0.4).any())

    def test_the_exact_form_reaches_the_target(self, scores: Tensor) -> None:
        before = scores.softmax(-1)[..., 2:5].sum(-1)
        after = weights_after(TargetMass(0.4, exact=True), scores, (2, 5))[..., 2:5].sum(-1)
        torch.testing.assert_close(after, before.clamp(min=0.4), rtol=1e-10, atol=1e-12)

    def test_a_layers_pool_gives_its_heads_one_bias(self, scores: Tensor) -> None:
        before = scores.softmax(-1)[..., 2:5].sum(-1).mean(0)
        change = weights_after(TargetMass(0.9, pool="layer"), scores, (2, 5)).log() - scores.softmax(-1).log()
        bias = change[..., 2] - change[..., 0]  # in the span and outside of it
        torch.testing.assert_close(bias, (0.9 / before).log().expand(4, -1), rtol=1e-9, atol=1e-9)

    def test_a_span_that_no_query_sees_stays_finite(self) -> None:
        scores = torch.zeros(2, 1, 6, dtype=torch.float64)
        scores[..., 2:5] = -torch.inf
        for operation in (TargetMass(0.4), TargetMass(0.4, exact=True), TargetMass(0.4, pool="layer")):
            torch.testing.assert_close(weights_after(operation, scores, (2, 5)), scores.softmax(-1))
        scores[..., 2:5] = -1e4
        assert torch.isfinite(weights_after(TargetMass(0.4, exact=True), scores, (2, 5))).all()

    def test_half_precision_stays_finite_at_a_large_alpha(self) -> None:
        lm = tiny.tiny("llama", dtype=torch.float16)
        from trimtab.decoding.rejection import Rejection

        emphasized = emphasis(ScaleScores(1e5), SPANS[0], range(LAYERS))
        (answer,) = lm.generate(PROMPTS[0], emphasized, rejection=Rejection(0.0), max_new_tokens=4, logprobs=True)
        assert all(math.isfinite(value) for value in answer.logprobs)

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_the_column_after_the_span_is_untouched(self, scores: Tensor, name: str) -> None:
        """Columns beside the span keep their ratios to each other; those of the span change towards them."""
        change = weights_after(OPERATIONS[name], scores, (2, 5)).log() - scores.softmax(-1).log()
        outside = change[0, 0, [0, 1, 5, 6, 9]]
        torch.testing.assert_close(outside, outside[:1].expand(5), rtol=1e-9, atol=1e-9)
        steered = OPERATIONS[name]
        if not isinstance(steered, TargetMass):
            assert not torch.allclose(change[0, 0, 2:5], outside[:1].expand(3), atol=1e-3)


@contextmanager
def spelled_out(lm: LM, edits: tuple[Edit, ...], prompt_length: int) -> Iterator[None]:
    """Attention over one whole text without a cache, in loops over heads and queries."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple:
        layer = module.layer_idx
        heads, length = query.shape[1:3]
        repeat = heads // key.shape[1]
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        output = torch.zeros(1, length, heads, value.shape[-1], dtype=value.dtype)
        for q in range(length):
            seen = range(max(0, q + 1 - (options.get("sliding_window") or length)), q + 1)
            rows = []
            for h in range(heads):
                s = key[0, h // repeat] @ query[0, h, q] * scale
                for e in (e for e in edits if e.site.layer == layer and isinstance(e.operation, ScaleScores)):
                    s[inside(e, length)] *= e.operation.alpha
                if options.get("softcap"):
                    s = torch.tanh(s / options["softcap"]) * options["softcap"]
                hidden = [c for c in range(length) if c not in seen]
                s[hidden] = -math.inf
                rows.append(s)
            scores = torch.stack(rows)
            for e in (e for e in edits if e.site.layer == layer):
                if isinstance(e.operation, BiasScores):
                    span = inside(e, length)
                    if e.operation.outside:
                        span = [c for c in range(min(prompt_length, length)) if c not in span]
                    for h in range(heads) if e.operation.heads is None else e.operation.heads:
                        scores[h, span] += e.operation.bias
                elif isinstance(e.operation, TargetMass):
                    span = inside(e, length)
                    mass = scores.softmax(-1)[:, span].sum(-1)
                    mass = mass.mean().expand(heads) if e.operation.pool == "layer" else mass
                    for h in range(heads):
                        m, t = max(float(mass[h]), 1e-10), e.operation.target
                        if m < t:
                            scores[h, span] += math.log(t * (1 - m) / (m * (1 - t)) if e.operation.exact else t / m)
            for h in range(heads):
                output[0, q, h] = scores[h].softmax(-1) @ value[0, h // repeat]
        return output, None

    ALL_ATTENTION_FUNCTIONS.register("test-loops", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("test-loops", lambda **_: None)
    config = lm.layout.decoder.config
    before, config._attn_implementation = config._attn_implementation, "test-loops"
    try:
        yield
    finally:
        config._attn_implementation = before


def inside(edit: Edit, length: int) -> list[int]:
    return [c for a, b in edit.positions.intervals for c in range(a.offset, b.offset) if c < length]  # type: ignore[union-attr]


def naive(lm: LM, text: str, steering: Steering) -> list[int]:
    ids = lm.encode(text)
    start = len(ids)
    with torch.no_grad(), spelled_out(lm, steering.edits, start):
        for _ in range(NEW):
            ids.append(int(lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2", "mistral", "gemma3", "opt", "olmo2", "qwen2_vl"])
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


@pytest.fixture(scope="module")
def plain(lm: LM) -> Any:
    return lm.generate(PROMPTS, max_new_tokens=NEW, logprobs=True)


class TestGeneration:
    @pytest.mark.long_unless(lambda lm, name: lm in ("llama", "gemma2", "gemma3") or name in ("scaling", "spotlight"))
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_a_mixed_batch_equals_attention_spelled_out(self, lm: LM, plain: Any, name: str) -> None:
        """Prompts of different lengths, spans and an unsteered request, over a cache; alone, without one."""
        steerings = [emphasis(OPERATIONS[name], spans, (0, 2, 3)) for spans in SPANS]
        answers = lm.generate(PROMPTS, [steerings[0], steerings[1], None], max_new_tokens=NEW, logprobs=True)
        for i in (0, 1):
            assert list(answers[i].token_ids) == naive(lm, PROMPTS[i], steerings[i])
        assert answers[2].token_ids == plain[2].token_ids
        assert answers[2].logprobs == plain[2].logprobs  # to the bit
        assert all(answers[i].logprobs != plain[i].logprobs for i in (0, 1))

    def test_strength_zero_is_nothing(self, lm: LM, plain: Any) -> None:
        nothing = [0.0 * emphasis(OPERATIONS["scaling"], spans, range(LAYERS)) for spans in SPANS]
        answers = lm.generate(PROMPTS, nothing, max_new_tokens=NEW, logprobs=True)
        assert [a.logprobs for a in answers] == [a.logprobs for a in plain]

    def test_nothing_is_left_behind(self, lm: LM) -> None:
        before = (lm.layout.decoder.config._attn_implementation, sorted(ALL_ATTENTION_FUNCTIONS))
        lm.generate(PROMPTS[0], emphasis(OPERATIONS["boost"], SPANS[0], [1]), max_new_tokens=2)
        assert (lm.layout.decoder.config._attn_implementation, sorted(ALL_ATTENTION_FUNCTIONS)) == before


class TestMethods:
    def test_each_finds_its_words(self) -> None:
        lm = tiny.tiny("llama")
        words = PROMPTS[1].split()
        phrases = [words[3], " ".join(words[6:9])]
        spans = lm.spans(PROMPTS[1], phrases)
        assert (3, 4) in spans
        assert any(start <= 6 and stop >= 9 for start, stop in spans)
        for made, operation in (
            (directer(lm, PROMPTS[1], phrases), ScaleScores(100.0)),
            (spotlight(lm, PROMPTS[1], phrases, target=0.3), TargetMass(0.3)),
            (pasta(lm, PROMPTS[1], phrases), BiasScores(math.log(0.01), outside=True)),
        ):
            assert made == emphasis(operation, spans, range(LAYERS))

    def test_pasta_takes_heads_by_layer(self) -> None:
        lm = tiny.tiny("llama")
        made = pasta(lm, PROMPTS[0], PROMPTS[0].split()[2], {2: [3, 1], 0: [0]}, alpha=0.1)
        assert [(e.site.layer, e.operation.heads) for e in made.edits] == [(0, (0,)), (2, (1, 3))]  # type: ignore[union-attr]
        assert {e.operation.bias for e in made.edits} == {math.log(0.1)}  # type: ignore[union-attr]


class TestWhatCannotRun:
    @pytest.mark.parametrize(
        ("operation", "layer", "positions", "named"),
        [
            (BiasScores(1.0, heads=(7,)), 0, Positions.span(1, 2), "head 7.*0 to 3"),
            (ScaleScores(), 9, Positions.span(1, 2), "layer 9.*0 to 3"),
            (ScaleScores(), 0, Positions.generated(), "tokens of the prompt"),
            (ScaleScores(), 0, Positions.span(1, 99), "1:99 is not in the prompt"),
        ],
    )
    def test_it_raises_before_the_first_token(
        self, operation: ScoreOperation, layer: int, positions: Positions, named: str
    ) -> None:
        lm = tiny.tiny("llama")
        steering = Steering((Edit(Site(layer, "scores"), operation, positions),))
        with pytest.raises(TrimtabError, match=named):
            lm.generate(PROMPTS[0], steering, max_new_tokens=2)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: ScaleScores(0.0),
            lambda: ScaleScores(float("nan")),
            lambda: TargetMass(1.0),
            lambda: TargetMass(0.2, pool="token"),
            lambda: BiasScores(1.0, heads=()),
            lambda: BiasScores(float("inf")),
            lambda: ScaleScores(100.0).factor(99.0),
            lambda: TargetMass(0.6).mass(2.0),
        ],
    )
    def test_settings_that_make_no_sense(self, make: Any) -> None:
        with pytest.raises(TrimtabError):
            make()

    def test_inside_steered(self) -> None:
        lm = tiny.tiny("llama")
        with pytest.raises(TrimtabError, match=r"lm\.generate"), lm.steered(emphasis(ScaleScores(), SPANS[0], [0])):
            pass


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_file_holds_them(name: str, tmp_path: Path) -> None:
    emphasized = 0.5 * emphasis(OPERATIONS[name], SPANS[1], range(LAYERS), "manual")
    save(emphasized, tmp_path / "a.safetensors")
    read = load(tmp_path / "a.safetensors")
    assert read == emphasized
    assert read.card == emphasized.card


def test_a_soft_cap_that_the_model_itself_leaves_out_is_refused() -> None:
    lm = tiny.tiny("gemma2")
    lm.model.config._attn_implementation = "sdpa"
    with pytest.raises(UnsupportedError, match="attn_implementation='eager'"):
        lm.generate("w5 w6 w7", emphasize="w6", max_new_tokens=1)
