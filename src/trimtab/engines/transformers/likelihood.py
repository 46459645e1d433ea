"""Likelihoods of given answers under the unsteered model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.prefix_cache import PrefixCache
from trimtab.engines.transformers.read import inputs_of, padded
from trimtab.engines.transformers.weights import input_device, vocabulary_size
from trimtab.errors import TrimtabError
from trimtab.steering.tensors import to_float64

MAX_LOGITS = 16_000_000
"""The number of logits in memory at a time, for any vocabulary size: 64 MiB in float32."""


@torch.no_grad()
def mean_nlls(
    model: Any,
    layout: Layout,
    name: str,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    prefix_cache: PrefixCache | None = None,
) -> list[float]:
    """The mean negative log-probability of each answer's tokens, in nats, from one pass of the decoder.

    A context that several answers share, or that is in `prefix_cache`, is computed once.

    Args:
        model: The model.
        layout: Its layout.
        name: The model's name in error messages.
        texts: `(context ids, answer ids)` pairs, both non-empty.
        prefix_cache: Supplies the keys and values of contexts. By default, a temporary cache if contexts repeat.

    Raises:
        TrimtabError: The logits contain NaN.
    """
    decoder = layout.decoder
    device = input_device(decoder)
    contexts = [tuple(context[:-1]) for context, _ in texts]
    if prefix_cache is None and len(set(contexts)) < len(contexts):
        prefix_cache = PrefixCache(model, layout)
    if prefix_cache is not None and prefix_cache.usable_for(contexts):
        cache, before = prefix_cache.cache_for(contexts)
        starts = [0] * len(texts)
        ids, new = padded([[context[-1], *answer[:-1]] for context, answer in texts], left=False, device=device)
        inputs = inputs_of(decoder, ids, torch.cat([before, new], 1), cache)
    else:
        starts = [len(context) - 1 for context, _ in texts]
        ids, mask = padded([[*context, *answer[:-1]] for context, answer in texts], left=False, device=device)
        inputs = inputs_of(decoder, ids, mask, None)
    output = decoder(**inputs)
    hidden = output.last_hidden_state
    rows = torch.tensor([row for row, (_, answer) in enumerate(texts) for _ in answer])
    columns = torch.tensor([start + i for start, (_, a) in zip(starts, texts, strict=True) for i in range(len(a))])
    tokens = torch.tensor([token for _, answer in texts for token in answer])
    there = hidden[rows.to(hidden.device), columns.to(hidden.device)]
    with _logits_function(model, layout, type(output)) as give:
        each = _token_nlls(give, there, tokens, vocabulary_size(model))
    if each.isnan().any():
        raise TrimtabError(f"{name} produces NaN logits; load it in float32 or bfloat16")
    sums = torch.zeros(len(texts), dtype=torch.float64).index_add_(0, rows, each)
    return [total / len(answer) for total, (_, answer) in zip(sums.tolist(), texts, strict=True)]


def _token_nlls(give: Callable[[Tensor], Tensor], hidden: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """The negative log-probability of each token, `[tokens]` in float64, from the hidden states `[tokens, width]`."""
    parts = []
    each = max(1, MAX_LOGITS // vocabulary)
    for some, wanted in zip(hidden.split(each), tokens.split(each), strict=True):
        logits = give(some)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = logits.gather(-1, wanted.to(logits.device)[:, None])[:, 0]
        parts.append(to_float64(logits.logsumexp(-1) - chosen))
    return torch.cat(parts)


@contextmanager
def _logits_function(model: Any, layout: Layout, output: type) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a function from hidden states `[tokens, width]` to logits `[tokens, vocabulary]`.

    It runs the model's own forward with a decoder that is replaced by one that returns these states. So the logit
    scaling and soft-capping of some model families are applied, without a list of families. `output` is the class of
    the decoder's output.
    """
    decoder = layout.decoder
    own = vars(decoder).get("forward")  # accelerate puts one there
    outputs: list[Tensor] = []
    decoder.forward = lambda *_, **__: output(last_hidden_state=outputs[0][None])

    def logits(hidden: Tensor) -> Tensor:
        outputs[:] = [hidden]
        ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(decoder))
        return model(input_ids=ids, use_cache=False).logits[0]

    try:
        yield logits
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own
