"""The choice of how rows run through a model: over one shared cache (`rows`), or over copies of it (`forks`).

Sharing is faster. It requires that attention is the model's only memory, and attends to keys and values exactly as they
are cached. This isn't derived from the model's name: rows over a shared cache are compared with the model's own pass on
two made-up prompts, once per model.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.attention import attention_modules, check_attention
from trimtab.engines.transformers.forks import Forks
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.rows import NewestTokens, Rows, compile_versions
from trimtab.engines.transformers.weights import input_device, quantization
from trimtab.errors import TrimtabError

_shares: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
PROMPTS = ((1, 2, 3), (3, 1, 2, 4))
"""The token ids of the two test prompts; the first one is padded."""

COARSE = 0.05
"""The tolerance for quantized models, as a share of the largest logit: passes of other shapes may round activations
differently."""


def rows_for(model: Any, layout: Layout) -> Rows | Forks:
    """`Rows` if rows of this model can share one cache, else `Forks`."""
    return Rows(model, layout) if shares_cache(model, layout) else Forks(model, layout)


def shares_cache(model: Any, layout: Layout) -> bool:
    """Whether rows of this model can share one cache; tested at the first call."""
    if layout.decoder not in _shares:
        _shares[layout.decoder] = _may_share(model, layout) and _same_logits(model, layout)
    return _shares[layout.decoder]


def _may_share(model: Any, layout: Layout) -> bool:
    try:
        check_attention(layout)
        modules = attention_modules(layout)
        return (
            None not in modules
            and len(set(modules)) == len(modules)
            and compat.keeps_plain_cache(layout.decoder)
            and "position_ids" in compat.parameters(model)
        )
    except TrimtabError:
        return False


@torch.no_grad()
def _same_logits(model: Any, layout: Layout) -> bool:
    """Whether rows over a shared cache give the same logits as the model's own pass."""
    width, device = max(map(len, PROMPTS)), input_device(model)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in PROMPTS], device=device)
    ids = ids % model.get_input_embeddings().weight.shape[0]
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    lengths = [len(prompt) for prompt in PROMPTS]
    versions = compile_versions(layout, [], lengths, [width - length for length in lengths])
    rows = Rows(model, layout)
    try:
        cache = compat.whole_cache(model.config)
        kwargs = compat.with_cache(model, inputs, cache)
        expected = model(**kwargs, use_cache=True, return_dict=True).logits[:, -1]
        if len(cache.layers) != layout.layers:
            return False  # some blocks run several times, or attend to another block's cache
        token = NewestTokens(ids[:, -1:], positions[:, -1:], mask)
        with rows.open([]):
            logits = rows.run(token, cache, width, versions, [None] * 3, [0, 0, 1])
            joined = rows.run(token, cache, width, versions, [None] * 2, [0, 0], joining=[layout.layers - 1])
    except (TrimtabError, RuntimeError, IndexError, ValueError, TypeError, AttributeError, KeyError):
        return False  # the model can't run several rows in one batch entry
    coarse = quantization(model) is not None
    return _nearly_equal(logits, expected[[0, 0, 1]], coarse) and _nearly_equal(joined[:1], expected[:1], coarse)


def _nearly_equal(logits: Tensor, other: Tensor, coarse: bool) -> bool:
    """Whether two results of the same computation differ only by rounding: half of the dtype's digits agree.

    Rounding errors accumulate over the layers: to three of seven digits in a model with thirty layers. Results of
    different computations don't agree in any digit.
    """
    limit = (COARSE if coarse else torch.finfo(logits.dtype).eps ** 0.5) * float(other.abs().max())
    return bool((logits - other).abs().max() <= limit)
