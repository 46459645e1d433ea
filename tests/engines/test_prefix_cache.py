"""Results with cached prefixes equal those without, and each prefix is computed once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import tiny
import torch

from trimtab import LM, Add, Edit, Positions, Site, Steering, Threshold
from trimtab.engines.contract import ENOUGH, TOKENS_PER_BATCH, count_fitting
from trimtab.engines.request import Choice
from trimtab.engines.transformers.forced import PromptAnswer, teacher_forcing
from trimtab.engines.transformers.next_token import in_batches
from trimtab.engines.transformers.prefix_cache import PrefixCache, prefix_cache_of, use_prefix_cache
from trimtab.engines.transformers.read import can_share
from trimtab.evaluate.divergence import divergence, reference
from trimtab.evaluate.fluency import perplexities
from trimtab.steering.gates import ALWAYS, Gate
from trimtab.tune import at_nats

PROMPTS = [tiny.prompt(1, 12), tiny.prompt(2, 15), tiny.prompt(3, 12)]
WHERE = {
    "from the last prompt token": Positions.from_last_prompt_token(),
    "generated": Positions.generated(),
    "last prompt token": Positions.last_prompt_token(),
    "all": Positions.all(),
}
WINDOWED = {"mistral", "gemma2", "gemma3", "gemma3_multimodal"}
"""Their windows of 6 tokens end within these prompts."""


def steering(positions: Positions, gate: Gate = ALWAYS, strength: float = 1.0) -> Steering:
    edits = [Edit(Site(layer), Add(2 * tiny.direction(layer)), positions, strength, gate=gate) for layer in (1, 2)]
    return Steering(tuple(edits))


@contextmanager
def counted(lm: LM) -> Iterator[list[int]]:
    """The tokens of each pass of the decoder, pads counted."""
    passes: list[int] = []

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        passes.append((ids if ids is not None else kwargs["inputs_embeds"][..., 0]).numel())

    handle = lm.layout.decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def near(a: Any, b: Any, lm: LM) -> bool:
    precise = lm.model.dtype == torch.float64
    limits = {"rtol": 1e-9, "atol": 1e-9} if precise else {"rtol": 1e-3, "atol": 1e-4}
    return torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), **limits)


@pytest.mark.parametrize("family", tiny.FAMILIES)
class TestTheSame:
    def test_probabilities_of_given_answers(self, family: str) -> None:
        lm = tiny.tiny(family)
        base = reference(lm, PROMPTS, tokens=4)
        gated = steering(Positions.from_last_prompt_token(), Threshold(Site(1), tiny.direction(7), 0.0))
        wanted: list[Any] = [steering(where) for where in WHERE.values()] + [gated, None]
        wanted.append([steering(WHERE["all"]), None, steering(WHERE["generated"])])
        plain = [lm.answer_logits(base.texts, each) for each in wanted]
        with lm._caching_prefixes():
            for _ in range(2):
                for each, expected in zip(wanted, plain, strict=True):
                    read = lm.answer_logits(base.texts, each)
                    assert all(near(a, b, lm) for a, b in zip(read, expected, strict=True))

    def test_probabilities_of_candidates(self, family: str) -> None:
        lm = tiny.tiny(family)
        ids = [lm.encode(prompt) for prompt in PROMPTS]
        choices = [Choice(tuple(text), len(text) - 2, (3, 4)) for text in ids for _ in WHERE]
        steerings = [steering(where, strength=1 + n) for n, where in product(range(3), WHERE.values())]
        plain = [[row.logprobs for row in lm.next_logprobs(choices[n::4], steerings[n::4])] for n in range(4)]
        with lm._caching_prefixes():
            for _, n in product(range(2), range(4)):
                rows = [row.logprobs for row in lm.next_logprobs(choices[n::4], steerings[n::4])]
                assert near(rows, plain[n], lm)

    def test_perplexities(self, family: str) -> None:
        lm = tiny.tiny(family)
        contexts = [lm.encode(prompt) for prompt in PROMPTS]
        texts = [(context, [3 + n + i for i in range(1 + n)]) for n in range(3) for context in contexts]
        alone = [perplexities(lm, [text])[0] for text in texts]  # no context twice
        assert near(perplexities(lm, texts), alone, lm)
        with lm._caching_prefixes():
            for _ in range(2):
                assert near(perplexities(lm, texts), alone, lm)

    def test_gradients(self, family: str) -> None:
        lm = tiny.tiny(family)
        texts = [PromptAnswer(tuple(lm.encode(prompt)), (5, 6, 7)) for prompt in PROMPTS]
        site = Site(1)
        gradients = []
        with teacher_forcing(lm.model, lm.layout, [site]) as run:
            for _ in range(3):  # prompts are read in the first
                vector = torch.zeros(tiny.WIDTH, dtype=lm.model.dtype, requires_grad=True)
                logits = run.logits(texts, {site: lambda x, v=vector: v.expand_as(x)})
                torch.cat(logits).log_softmax(-1)[:, 5].sum().backward()
                gradients.append(vector.grad)
        alone = torch.zeros(tiny.WIDTH, dtype=lm.model.dtype, requires_grad=True)
        for text in texts:
            with teacher_forcing(lm.model, lm.layout, [site]) as run:
                (logits,) = run.logits([text], {site: lambda x: alone.expand_as(x)})
                logits.log_softmax(-1)[:, 5].sum().backward()
        assert all(near(gradient, alone.grad, lm) for gradient in gradients)


@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - WINDOWED))
def test_prompts_are_read_once(family: str) -> None:
    lm = tiny.tiny(family)
    base = reference(lm, PROMPTS, tokens=4)
    longest = max(len(text.answer) for text in base.texts)
    with lm._caching_prefixes():
        lm.answer_logits(base.texts, steering(WHERE["generated"]))
        with counted(lm) as passes:
            for strength in (0.5, 2.0):
                lm.answer_logits(base.texts, steering(WHERE["generated"], strength=strength))
    expected = len(PROMPTS) * (longest + 1) if can_share(lm.layout) else len(PROMPTS) * (15 + longest)
    assert passes == [expected, expected]


@pytest.mark.parametrize("family", sorted(WINDOWED))
def test_a_beginning_that_a_window_ends_in_is_read_with_the_text(family: str) -> None:
    lm = tiny.tiny(family)
    assert not PrefixCache(lm.model, lm.layout).usable_for([tuple(range(3, 15))])


def test_what_is_kept_goes_when_a_weight_changes() -> None:
    lm = tiny.tiny("llama")
    base = reference(lm, PROMPTS, tokens=4)
    steered = steering(WHERE["generated"])
    with lm._caching_prefixes():
        before = lm.answer_logits(base.texts, steered)
        with torch.no_grad():
            lm.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        after = lm.answer_logits(base.texts, steered)
    assert not near(before[0], after[0], lm)
    assert all(near(a, b, lm) for a, b in zip(after, lm.answer_logits(base.texts, steered), strict=True))
    with lm._caching_prefixes():
        other = torch.nn.Parameter(2 * lm.model.model.layers[0].mlp.up_proj.weight.detach())
        lm.answer_logits(base.texts, steered)
        lm.model.model.layers[0].mlp.up_proj.weight = other
        replaced = lm.answer_logits(base.texts, steered)
    assert near(replaced[0], lm.answer_logits(base.texts, steered)[0], lm)
    assert not near(replaced[0], after[0], lm)


def test_what_is_kept_goes_when_a_buffer_changes_or_a_weight_is_exchanged_again_and_again() -> None:
    lm = tiny.tiny("llama")
    texts = [tuple(lm.encode(tiny.prompt(1, 9)))]
    kept = PrefixCache(lm.model, lm.layout)
    up = lm.model.model.layers[0].mlp.up_proj
    for _ in range(20):  # a freed tensor's id is often used again
        kept.cache_for(texts)
        up.weight = torch.nn.Parameter(up.weight.detach().clone())
        up.weight = torch.nn.Parameter(up.weight.detach().clone())
        with counted(lm) as passes:
            kept.cache_for(texts)
        assert passes == [9]
    buffer = next(lm.model.buffers())
    buffer.mul_(1.0)
    with counted(lm) as passes:
        kept.cache_for(texts)
        kept.cache_for(texts)
    assert passes == [9]


def test_the_cache_is_this_threads_and_this_models() -> None:
    lm, other = tiny.tiny("llama"), tiny.tiny("llama", seed=1)
    with lm._caching_prefixes():
        mine = prefix_cache_of(lm.model)
        assert mine is not None
        assert prefix_cache_of(other.model) is None
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(prefix_cache_of, lm.model).result() is None
        with lm._caching_prefixes():
            assert prefix_cache_of(lm.model) is mine
        with use_prefix_cache(None):
            assert prefix_cache_of(lm.model) is None
        assert prefix_cache_of(lm.model) is mine
    assert prefix_cache_of(lm.model) is None


@pytest.mark.parametrize("seed", range(6))
def test_batches_have_every_row_once_and_few_pads(seed: int) -> None:
    drawn = random.Random(seed)
    texts = [tuple(drawn.choices(range(90), k=drawn.choice([9, 80, 200, 300]))) for _ in range(60)]
    choices = [Choice(text, len(text) - 2, (3,)) for text in texts for _ in range(3)]
    edits = [steering(drawn.choice([*WHERE.values()])).edits for _ in choices]
    batches = list(in_batches(choices, edits, 64))
    assert sorted(i for batch in batches for i in batch) == list(range(len(choices)))
    for batch in batches:
        assert len(batch) <= 64
        distinct = {choices[i].ids for i in batch}
        lengths = [len(text) for text in distinct]
        padded = max(lengths) * len(lengths)
        assert padded <= max(TOKENS_PER_BATCH, max(lengths))
        assert padded <= max(ENOUGH, max(lengths), 1.1 * sum(lengths))


def test_how_many_texts_fit() -> None:
    assert count_fitting([5000], TOKENS_PER_BATCH) == 1
    assert count_fitting([10, 10, 10], 29) == 2
    assert count_fitting([10, 10, 10], 30) == 3
    assert count_fitting([100] * 30, 2000) == 20
    assert count_fitting([500, 500, 500, 300], 4096) == 3  # 2000 columns for 1800 tokens


def test_no_more_is_kept_than_fits() -> None:
    lm = tiny.tiny("llama")
    texts = sorted(tuple(lm.encode(tiny.prompt(seed, 10))) for seed in range(6))
    once = PrefixCache(lm.model, lm.layout)
    once.cache_for(texts[:1])
    some = PrefixCache(lm.model, lm.layout, limit=3 * once.cached_bytes)
    some.cache_for(texts)
    assert some.cached_bytes == 3 * once.cached_bytes
    with counted(lm) as passes:
        some.cache_for(texts[3:])
        some.cache_for([texts[5], texts[5], texts[0]])  # the last one went first
    assert passes == [10]
    none = PrefixCache(lm.model, lm.layout, limit=once.cached_bytes - 1)
    cache, mask = none.cache_for(texts)
    assert (none.cached_bytes, mask.shape, cache.get_seq_length()) == (0, (6, 10), 10)


def test_what_is_kept_has_no_gradients_and_meets_some_later() -> None:
    lm = tiny.tiny("llama")
    kept = PrefixCache(lm.model, lm.layout)
    texts = [tuple(lm.encode(tiny.prompt(seed, 9))) for seed in range(2)]
    modes = [torch.enable_grad(), torch.no_grad(), torch.inference_mode()]
    for n, mode in enumerate(modes):
        with mode:
            cache, _ = kept.cache_for([(*text, 3 + n) for text in texts])
        assert not any(layer.keys.requires_grad for layer in cache.layers)
        again, _ = kept.cache_for([(*text, 3 + n) for text in texts])
        assert not any(layer.keys.is_inference() for layer in again.layers)


def test_a_cache_is_the_callers() -> None:
    lm = tiny.tiny("llama")
    texts = [tuple(lm.encode(tiny.prompt(seed, 8 + seed))) for seed in range(3)]
    kept = PrefixCache(lm.model, lm.layout)
    first, _ = kept.cache_for(texts)
    expected = [layer.keys.clone() for layer in first.layers]
    for layer in first.layers:
        layer.keys.zero_()
    again, _ = kept.cache_for(texts)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(again.layers, expected, strict=True))


def test_a_divergence_in_nats_reads_its_prompts_once() -> None:
    lm = tiny.tiny("llama")
    base = reference(lm, PROMPTS, tokens=4)
    steered = steering(WHERE["from the last prompt token"])
    with counted(lm) as passes:
        scaled = at_nats(lm, steered, 0.5, base)
    assert len(passes) > 3
    assert sum(tokens > 3 * 6 for tokens in passes) == 1
    assert divergence(lm, scaled.steering, base).p95 == pytest.approx(scaled.divergence.p95, rel=1e-9)
