"""A forward pass of the whole model with a KV cache, as decoding loops run it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.monitoring import MonitorReader


def last_logits(
    model: Any,
    ids: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    cache: Any,
    watch: MonitorReader | None = None,
    more: Mapping[str, Any] | None = None,
) -> Tensor:
    """The last column's logits `[rows, vocabulary]`, in float32 on the device of `ids`.

    Args:
        model: The whole model.
        ids: `[rows, tokens]`.
        mask: `[rows, columns of the cache and these tokens]`, 0 at padding; `None` if there is no padding.
        positions: Position ids `[rows, tokens]`, ignored if the model doesn't take them; `None` lets the model compute
            them.
        cache: The KV cache of the preceding tokens, to which these tokens are added.
        watch: Reads the last column for monitors.
        more: Further inputs of the model, for the tokens' images.
    """
    takes = compat.parameters(model)
    inputs = compat.with_cache(model, {"input_ids": ids, "attention_mask": mask}, cache)
    if mask is not None and mask.shape[1] > ids.shape[1] and compat.is_state_alone(cache):
        del inputs["attention_mask"]  # a recurrent state has no columns
    if "position_ids" in takes and positions is not None:
        inputs["position_ids"] = positions
    if "logits_to_keep" in takes:
        inputs["logits_to_keep"] = 1
    with watch.open(len(ids)) if watch is not None else nullcontext():
        output = model(**inputs, **(more or {}), use_cache=True, return_dict=True)
    return output.logits[:, -1].to(dtype=torch.float32, device=ids.device)
