"""Rows over copies of the cache give what rows over a shared one give, and models go the way that they can."""

from __future__ import annotations

import pytest
import torch
from tiny import direction, prompt, tiny

from trimtab import Add, Edit, Positions, Site, Steering
from trimtab.decoding.rejection import Rejection
from trimtab.engines.transformers import compat, decode, sharing
from trimtab.engines.transformers.forks import Forks
from trimtab.engines.transformers.rows import Rows
from trimtab.steering import ScaleScores, emphasis

PROMPTS = [prompt(seed, length) for seed, length in enumerate((7, 4, 10))]


def steering(lm) -> Steering:
    added = Steering((Edit(Site(1), Add(direction(1, 3.0)), Positions.all()),))
    return added + emphasis(ScaleScores(), [(1, 3)], range(lm.layout.layers), "manual")


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("schedule", ["optimistic", "fused"])
def test_the_same_as_rows_over_one_cache(family: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny(family)
    how = {"max_new_tokens": 4, "logprobs": True, "rejection": Rejection(beta=0.1, schedule=schedule)}
    shared = lm.generate(PROMPTS, steering(lm), **how)
    assert any(step.open for answer in shared for step in answer.trace.steps)
    monkeypatch.setattr(decode, "rows_for", Forks)
    forked = lm.generate(PROMPTS, steering(lm), **how)
    for mine, theirs in zip(shared, forked, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.trace.steps == theirs.trace.steps
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-8)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "phi3"])
def test_plain_attention_shares_one_cache(family: str) -> None:
    lm = tiny(family)
    assert isinstance(sharing.rows_for(lm.model, lm.layout), Rows)


@torch.no_grad()
def test_what_is_put_aside_stays_as_it_was() -> None:
    lm = tiny("gemma3")
    cache = compat.new_cache(lm.model.config)
    ids = torch.arange(3, 11)[None]
    lm.model(**compat.with_cache(lm.model, {"input_ids": ids}, cache), use_cache=True)
    aside = compat.snapshot_cache(cache)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in aside.layers]
    forked = compat.fork(aside, torch.tensor([0, 0, 0]))
    for kept in (cache, forked):
        rows = kept.layers[0].keys.shape[0]
        tokens = torch.full((rows, 1), 12)
        lm.model(**compat.with_cache(lm.model, {"input_ids": tokens}, kept), use_cache=True)
    assert forked.layers[0].keys.shape[0] == 3
    for layer, (keys, values) in zip(aside.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


@pytest.mark.real
def test_the_default_model_shares_one_cache(lm) -> None:
    """In float32 too, where rounding adds up over its thirty layers."""
    assert isinstance(sharing.rows_for(lm.model, lm.layout), Rows)
