"""Edits of the keys that attention stores, against attention spelled out with every key recomputed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import LAYERS, naive_edit, prompt, read_write
from torch import Tensor

from trimtab import (
    LM,
    Add,
    BiasScores,
    Edit,
    Positions,
    Rejection,
    ScaleElements,
    ScaleKeys,
    ScaleScores,
    Site,
    Steering,
    TrimtabError,
    UnsupportedError,
    by_keys,
    load,
    save,
)
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.attention import attention_modules, configurations, registered_attention
from trimtab.steering import emphasis
from trimtab.steering.gates import Threshold

QUICK = ("llama", "gemma2", "gemma3")
"""Grouped heads, soft caps, sliding windows and normed keys."""
LONG = ("qwen3", "gpt2", "gpt_neox", "mixtral")
FAMILIES = (*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in LONG))
PROMPTS = [prompt(seed, length) for seed, length in enumerate((4, 9, 6, 12))]
NEW = 3
CLOSE = {torch.float64: 1e-6, torch.float32: 2e-4}


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    made = tiny.tiny(request.param)
    if request.param == "gemma2":  # sdpa leaves its soft cap out
        made.model.config._attn_implementation = "eager"
    return made


def vector(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / size**0.5


def size_of(lm: LM) -> int:
    (keys,) = lm.capture(PROMPTS[0], [Site(0, "keys")], Positions.all())
    return int(keys[Site(0, "keys")].shape[-1])


def mixed(lm: LM) -> list[Steering | None]:
    """A steering a request: every kind of edit at keys, alone, in sequence and beside one of the residual stream."""
    size, span = size_of(lm), Positions.span(1, 3)
    scaled = emphasis(ScaleKeys(3.0), [(1, 3), (4, 6)], range(LAYERS))
    keys = [Site(layer, "keys") for layer in range(LAYERS)]
    sequence = (
        Edit(keys[1], ScaleKeys(2.0), span, -0.5),
        Edit(keys[1], read_write(2, 5, size, low=0.0), Positions.all(), 0.7),
        Edit(keys[2], Add(vector(size, 3)), Positions.generated(), 2.0),
        Edit(keys[3], ScaleElements(vector(size, 4)), Positions.from_last_prompt_token(), 0.5),
        Edit(Site(0), Add(vector(lm.layout.width, 5)), Positions.all(), 0.5),
    )
    both = (*(1.5 * scaled.only([1, 3])).edits, Edit(keys[3], ScaleKeys(1.5), Positions.prompt()))
    return [Steering(sequence), None, scaled, Steering(both)]


def naive_key(edit: Edit, key: Tensor) -> Tensor:
    """One token's key `[width]` after one edit."""
    if isinstance(edit.operation, ScaleKeys):
        return key * edit.operation.alpha**edit.strength
    if isinstance(edit.operation, ScaleElements):
        return key + edit.strength * edit.operation.direction * key
    return naive_edit(edit, key)


@contextmanager
def spelled_out(lm: LM, edits: Sequence[Edit], n: int) -> Iterator[list[Tensor]]:
    """The model's own attention over keys edited token by token, of one whole text; each layer's keys, in order."""
    modules, usual = attention_modules(lm.layout), compat.attention_name(lm.layout.decoder.config)
    seen: list[Tensor] = []

    def attention(module: Any, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
        layer = modules.index(module)
        flat = key[0].transpose(0, 1).flatten(1).double()  # [tokens, width]
        for edit in edits:
            if edit.site == Site(layer, "keys"):
                flat = torch.stack([naive_key(edit, k) if holds(edit, t, n) else k for t, k in enumerate(flat)])
        seen.append(flat)
        edited = flat.to(key.dtype).view(len(flat), key.shape[1], -1).transpose(0, 1)[None]
        return compat.attention_function(usual, module)(module, query, edited, *args, **options)

    with registered_attention(attention, compat.mask_function(usual)) as name:
        with compat.with_attention_implementation(configurations(lm.layout), name):
            yield seen


def holds(edit: Edit, t: int, n: int) -> bool:
    return any(start <= t and (stop is None or t < stop) for start, stop in edit.positions.resolve(n))


@torch.no_grad()
def naive_generate(lm: LM, text: str, steering: Steering | None, count: int) -> tuple[list[int], list[float]]:
    ids, edits = lm.encode(text), steering.edits if steering else ()
    n, tokens = len(ids), []
    for _ in range(count):
        handles = [
            lm.layout.blocks[edit.site.layer].register_forward_hook(
                lambda _m, _a, out, e=edit: (
                    out + e.strength * e.operation.direction.to(out.dtype)
                    if isinstance(out, Tensor)
                    else (out[0] + e.strength * e.operation.direction.to(out[0].dtype), *out[1:])
                )
            )
            for edit in edits
            if edit.site.kind == "residual"
        ]
        with spelled_out(lm, edits, n):
            last = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        ids.append(int(last.argmax()))
        tokens.append(float(last.log_softmax(-1)[ids[-1]]))
    return ids[n:], tokens


def test_a_mixed_batch_equals_keys_recomputed(lm: LM) -> None:
    """Over a cache and without one, padded and alone; the unsteered row is as it is to the bit."""
    steerings, close = mixed(lm), CLOSE[lm.model.dtype]
    plain = lm.generate(PROMPTS, None, max_new_tokens=NEW, logprobs=True)
    for way in ({}, {"use_cache": False}, {"batch_size": 1}):
        answers = lm.generate(PROMPTS, steerings, max_new_tokens=NEW, logprobs=True, **way)
        for text, acting, answer in zip(PROMPTS, steerings, answers, strict=True):
            tokens, logprobs = naive_generate(lm, text, acting, NEW)
            assert list(answer.token_ids) == tokens
            assert answer.logprobs == pytest.approx(logprobs, abs=close)
        if not way:
            assert (answers[1].token_ids, answers[1].logprobs) == (plain[1].token_ids, plain[1].logprobs)
    again = lm.generate(
        PROMPTS, [0 * steering if steering else None for steering in steerings], max_new_tokens=NEW, logprobs=True
    )
    assert [(a.token_ids, a.logprobs) for a in again] == [(a.token_ids, a.logprobs) for a in plain]


def test_scaled_keys_are_scaled_scores(lm: LM) -> None:
    """Of a span in the prompt, at every layer, with strengths that aren't 1."""
    spans = [(0, 2), (3, 4)]
    steerings = [s * emphasis(ScaleScores(4.0), spans, range(LAYERS)) for s in (1.0, 0.5, -0.7, 1.3)]
    scores = lm.generate(PROMPTS, steerings, max_new_tokens=NEW, logprobs=True)
    keys = lm.generate(PROMPTS, list(map(by_keys, steerings)), max_new_tokens=NEW, logprobs=True)
    plain = lm.generate(PROMPTS, None, max_new_tokens=NEW, logprobs=True)
    for score, other, without in zip(scores, keys, plain, strict=True):
        assert score.token_ids == other.token_ids
        assert score.logprobs == pytest.approx(other.logprobs, abs=CLOSE[lm.model.dtype])
        assert score.logprobs != pytest.approx(without.logprobs, abs=1e-3)


def test_what_is_read_is_what_attention_is_given(lm: LM) -> None:
    sites = [Site(layer, "keys") for layer in range(LAYERS)]
    for text, captured in zip(PROMPTS, lm.capture(PROMPTS, sites, Positions.all()), strict=True):
        with torch.no_grad(), spelled_out(lm, (), 0) as keys:
            lm.model(input_ids=torch.tensor([lm.encode(text)]), use_cache=False)
        for site, expected in zip(sites, keys, strict=True):
            assert torch.allclose(captured[site].double(), expected, atol=CLOSE[lm.model.dtype])


class TestOneModel:
    """What doesn't depend on the family."""

    @pytest.fixture
    def lm(self) -> LM:
        return tiny.tiny("llama")

    def test_gates_and_other_ways_to_run(self, lm: LM) -> None:
        """A gate that reads a key, generation inside `steered`, and rows that join and leave."""
        (read,) = lm.capture(PROMPTS[1], [Site(1, "keys")])
        direction = read[Site(1, "keys")][-1]
        emphasized = emphasis(ScaleKeys(3.0), [(1, 3)], range(LAYERS))
        shut = emphasized.when(Threshold(Site(1, "keys"), direction, 1e9))
        wide = emphasized.when(Threshold(Site(1, "keys"), direction, -1e9))
        expected = [lm.generate(PROMPTS[1], s, max_new_tokens=NEW)[0].token_ids for s in (None, emphasized)]
        answers = lm.generate([PROMPTS[1]] * 2, [shut, wide], max_new_tokens=NEW)
        assert [answer.token_ids for answer in answers] == expected
        ids = torch.tensor([lm.encode(PROMPTS[1])])
        with lm.steered(emphasized):
            output = lm.model.generate(ids, max_new_tokens=NEW, do_sample=False)
        assert tuple(output[0, ids.shape[1] :].tolist()) == expected[1]

    def test_files_and_arithmetic(self, lm: LM, tmp_path: Path) -> None:
        for i, steering in enumerate(filter(None, mixed(lm))):
            save(steering, tmp_path / f"{i}.safetensors")
            assert load(tmp_path / f"{i}.safetensors") == steering
        twice = emphasis(ScaleKeys(2.0), [(0, 3)], [1])
        twice = twice + 2.0 * twice
        eight = emphasis(ScaleKeys(8.0), [(0, 3)], [1])
        first, second = lm.generate([PROMPTS[1]] * 2, [twice, eight], max_new_tokens=NEW, logprobs=True)
        assert first.logprobs == pytest.approx(second.logprobs, abs=1e-9)

    def test_it_raises_before_the_first_token(self, lm: LM) -> None:
        span = emphasis(ScaleKeys(3.0), [(1, 3)], range(LAYERS))
        with pytest.raises(TrimtabError, match="acts at keys, not at"):
            Edit(Site(1), ScaleKeys(2.0))
        with pytest.raises(TrimtabError, match="above 0"):
            ScaleKeys(0.0)
        with pytest.raises(TrimtabError, match="lower it"):
            lm.generate(PROMPTS[0], 200 * span, max_new_tokens=1)
        with pytest.raises(TrimtabError, match=r"width at keys\[1\] is 5, this model's is 16"):
            lm.check(Steering((Edit(Site(1, "keys"), Add(torch.ones(5))),)))
        with pytest.raises(UnsupportedError, match="acts only on the prompt"):
            lm.generate(PROMPTS[0], span, rejection=Rejection(beta=0.5), max_new_tokens=1)
        with pytest.raises(UnsupportedError, match="acts only before it"):
            lm.generate(PROMPTS[0], span, clean_cache=True, max_new_tokens=1)
        with pytest.raises(UnsupportedError, match="attention interface"):
            tiny.tiny("falcon").check(span)

    def test_latents_are_no_keys(self) -> None:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

        config = DeepseekV3Config(
            **{**tiny.SIZES, "num_hidden_layers": 2, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8},
            qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=2, n_routed_experts=4,
        )  # fmt: skip
        lm = LM(DeepseekV3ForCausalLM(config).eval(), tiny.tokenizer())
        with pytest.raises(UnsupportedError, match="latents"):
            lm.check(emphasis(ScaleKeys(3.0), [(1, 3)], [1]))

    def test_other_score_operations_stay_on_scores(self) -> None:
        biased = emphasis(BiasScores(1.0), [(0, 2)], [0, 1])
        assert by_keys(biased) == biased
