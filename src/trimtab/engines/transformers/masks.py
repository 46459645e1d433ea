"""Masks of padded batches that are made without the host waiting for the device.

transformers looks at each pass whether a batch has pads at all, as attention is faster without a mask; on a GPU the
host waits for the answer. Whoever knows that there are pads needn't ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.attention import attention_modules, configurations, registered
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.weights import input_device


class PaddedMasks:
    """For one model, whose attention must be transformers' `sdpa`; to other models nothing is done."""

    def __init__(self, layout: Layout) -> None:
        decoder: Any = layout.decoder
        waits = input_device(decoder).type != "cpu"
        suits = waits and None not in attention_modules(layout) and compat.attention_name(decoder.config) == "sdpa"
        self._configs: Sequence[Any] = configurations(layout) if suits else ()

    def of(self, padded: bool) -> Callable[..., Tensor | None] | None:
        """What makes the masks of a batch with pads, if it is `padded`; `None`: what the model has for it."""
        return _mask if padded and self._configs else None

    @contextmanager
    def open(self, padded: bool) -> Iterator[None]:
        """While open, passes are of a batch with pads, if it is `padded`."""
        if self.of(padded) is None:
            yield
            return
        with registered(compat.sdpa_attention(), _mask) as name, compat.attending_with(self._configs, name):
            yield


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return compat.sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
