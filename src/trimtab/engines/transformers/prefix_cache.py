"""A cache of keys and values of unsteered text prefixes, so that prompts used many times are computed once.

The same unsteered prompts occur for each strength of a steering that acts on answers only, for each method compared on
the same questions, and in each step of gradient descent. The cache is cleared when a weight of the model changes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from trimtab.engines.contract import TOKENS_PER_BATCH, count_fitting
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.compat import DynamicCache
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.read import SHARE_FROM, can_share, inputs_of, padded
from trimtab.engines.transformers.weights import input_device

SHARE_OF_WEIGHTS = 0.4
"""The memory limit as a share of the weights' size; at least `LEAST_BYTES`."""
LEAST_BYTES = 64 * 2**20

Ids = tuple[int, ...]
Layers = tuple[tuple[Tensor, Tensor] | None, ...]
"""Keys and values of each layer, `[heads, tokens, size]`; `None` for a layer that caches none of its own."""
Versions = tuple[tuple["ref[Tensor]", int], ...]
"""Each weight, and how often it was modified in place."""


@dataclass
class PrefixCache:
    """Prefixes computed with one model; the least recently used are dropped first.

    Args:
        model: The whole model.
        layout: Its layout.
        limit: The maximum size in bytes; default: a share of the weights' size.
    """

    model: nn.Module
    layout: Layout
    limit: int = 0
    cached_bytes: int = field(default=0, init=False)
    _entries: OrderedDict[Ids, Layers] = field(default_factory=OrderedDict, init=False)
    _weights: Versions = field(default=(), init=False)

    def __post_init__(self) -> None:
        if not self.limit:
            size = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
            self.limit = max(LEAST_BYTES, int(SHARE_OF_WEIGHTS * size))

    def usable_for(self, prefixes: Sequence[Ids]) -> bool:
        """Whether passes can continue from these prefixes.

        The model must cache plain keys and values, with sliding windows longer than the prefixes, the prefixes must be
        long enough to be worth it, and changes of the weights must be detectable.
        """
        if min(map(len, prefixes), default=0) < SHARE_FROM or not can_share(self.layout):
            return False
        longest = max(map(len, prefixes))
        layers = DynamicCache(config=self.layout.decoder.config).layers  # type: ignore[arg-type]
        windows = [getattr(layer, "sliding_window", None) for layer in layers if type(layer) is not compat.DynamicLayer]
        return all(isinstance(window, int) and window > longest for window in windows) and self._tracked()

    def cache_for(self, prefixes: Sequence[Ids]) -> tuple[DynamicCache, Tensor]:
        """A new KV cache with a left-padded row for each prefix, and its mask `[rows, tokens]`.

        Prefixes that aren't cached yet are computed first. Requires that `usable_for` is true for them.
        """
        if _changed(self.model, self._weights):
            self._entries.clear()
            self.cached_bytes, self._weights = (
                0,
                tuple((ref(weight), weight._version) for weight in _weights(self.model)),
            )
        distinct = list(dict.fromkeys(prefixes))
        rows = {ids: self._entries[ids] for ids in distinct if ids in self._entries}
        for ids in rows:
            self._entries.move_to_end(ids)
        unread = sorted((ids for ids in distinct if ids not in rows), key=lambda ids: (len(ids), ids))
        while unread:
            count = count_fitting([len(ids) for ids in unread], TOKENS_PER_BATCH)
            some, unread = unread[:count], unread[count:]
            for ids, layers in zip(some, self._read(some), strict=True):
                rows[ids] = layers
                self._keep(ids, layers)
        return self._stack([rows[ids] for ids in prefixes], [len(ids) for ids in prefixes])

    def _tracked(self) -> bool:
        """Whether in-place changes of the weights can be detected: torch doesn't count those of inference tensors."""
        return not any(weight.is_inference() for weight in _weights(self.model))

    def _read(self, texts: Sequence[Ids]) -> list[Layers]:
        """The keys and values of each text, from one pass."""
        cache = DynamicCache(config=self.layout.decoder.config)  # type: ignore[arg-type]
        ids, mask = padded([list(text) for text in texts], left=True, device=input_device(self.model))
        with torch.inference_mode(False), torch.no_grad():  # tensors without a graph, usable with autograd
            self.layout.decoder(**inputs_of(self.layout.decoder, ids, mask, cache))
        entries: list[Any] = list(cache.layers)
        return [
            tuple(
                None
                if getattr(layer, "keys", None) is None
                else (layer.keys[row, :, -len(text) :].clone(), layer.values[row, :, -len(text) :].clone())
                for layer in entries
            )
            for row, text in enumerate(texts)
        ]

    def _keep(self, ids: Ids, layers: Layers) -> None:
        size = _bytes(layers)
        if size > self.limit:
            return
        while self.cached_bytes + size > self.limit:
            self.cached_bytes -= _bytes(self._entries.popitem(last=False)[1])
        self._entries[ids] = layers
        self.cached_bytes += size

    def _stack(self, rows: Sequence[Layers], lengths: Sequence[int]) -> tuple[DynamicCache, Tensor]:
        cache = DynamicCache(config=self.layout.decoder.config)  # type: ignore[arg-type]
        longest = max(lengths)
        for layer, entries in enumerate(zip(*rows, strict=True)):
            own = [entry for entry in entries if entry is not None]
            if own:
                keys, values = (_padded([entry[part] for entry in own], longest) for part in (0, 1))
                cache.update(keys, values, layer)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for row, length in enumerate(lengths):
            mask[row, longest - length :] = 1
        return cache, mask.to(input_device(self.model))


def prefix_cache_of(model: nn.Module) -> PrefixCache | None:
    """The cache that is open for this model in this thread, if there is one."""
    cache = _current_cache.get()
    return cache if cache is not None and cache.model is model else None


@contextmanager
def use_prefix_cache(cache: PrefixCache | None) -> Iterator[None]:
    """While open, this thread computes probabilities with this cache; `None`: with none.

    Changes through `Tensor.data` go unnoticed, so code that may change weights must run with none.
    """
    token = _current_cache.set(cache)
    try:
        yield
    finally:
        _current_cache.reset(token)


_current_cache: ContextVar[PrefixCache | None] = ContextVar("_open", default=None)


def _padded(rows: Sequence[Tensor], longest: int) -> Tensor:
    """`[rows, heads, longest, size]`: these tensors `[heads, tokens, size]`, padded on the left with zeros."""
    whole = rows[0].new_zeros(len(rows), rows[0].shape[0], longest, rows[0].shape[2])
    for row, tensor in enumerate(rows):
        whole[row, :, longest - tensor.shape[1] :] = tensor
    return whole


def _bytes(layers: Layers) -> int:
    return sum(tensor.numel() * tensor.element_size() for pair in layers if pair is not None for tensor in pair)


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers: some quantized models keep their weights in buffers."""
    return chain(model.parameters(), model.buffers())


def _changed(model: nn.Module, before: Versions) -> bool:
    """Whether a weight was added, removed, replaced or modified in place."""
    now = list(_weights(model))
    return len(now) != len(before) or any(
        known() is not weight or version != weight._version
        for weight, (known, version) in zip(now, before, strict=True)
    )
