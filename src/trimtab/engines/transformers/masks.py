"""Attention masks of padded batches, created without a device synchronization.

At each pass transformers checks whether the batch has any padding, as attention is faster without a mask. On a GPU this
check waits for the device. It is skipped for batches that are known to be padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.attention import attention_modules, configurations, registered_attention
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.weights import input_device


class PaddedMasks:
    """The masks for one model. Without effect on the CPU, or if its attention isn't transformers' `sdpa`."""

    def __init__(self, layout: Layout) -> None:
        decoder: Any = layout.decoder
        waits = input_device(decoder).type != "cpu"
        suits = waits and None not in attention_modules(layout) and compat.attention_name(decoder.config) == "sdpa"
        self._configs: Sequence[Any] = configurations(layout) if suits else ()

    def function_for(self, padded: bool) -> Callable[..., Tensor | None] | None:
        """The mask function for a batch, if it is `padded`; `None`: use the model's own."""
        return _mask if padded and self._configs else None

    @contextmanager
    def open(self, padded: bool) -> Iterator[None]:
        """Within the context, passes use the mask function for padded batches, if `padded`."""
        if self.function_for(padded) is None:
            yield
            return
        with (
            registered_attention(compat.sdpa_attention(), _mask) as name,
            compat.with_attention_implementation(self._configs, name),
        ):
            yield


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return compat.sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
