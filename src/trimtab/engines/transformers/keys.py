"""Edit and read attention keys at the point where a block's attention passes them to its KV cache.

There the keys are final: projected, normalized and rotated. The edited keys are stored, and all later queries attend to
them. So a cache with edited keys is exact for any type of cache layer, and the model's own attention reads it.

Models declare the number and size of their key heads in different ways. So a few arbitrary tokens are run once per
model, and the tensors written to the cache are compared with the keys that attention gets: if a model caches latents
that the keys are computed from, it has no keys to edit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.anatomy import ROWS, TOKENS
from trimtab.engines.transformers.attention import attention_modules, configurations, registered_attention
from trimtab.engines.transformers.compat import DynamicCache
from trimtab.engines.transformers.exclusive import reading, steered_here
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Site

Change = Callable[[Tensor], Tensor | None]
"""Maps activations `[rows, tokens, width]` to new ones; `None`: unchanged, or changed in place."""


@dataclass(frozen=True)
class Keys:
    """A block's keys: its attention module, and the number and size of the heads that it stores."""

    attention: nn.Module
    heads: int
    size: int


_known: WeakKeyDictionary[nn.Module, tuple[Keys | str, ...]] = WeakKeyDictionary()


def keys_of(layout: Layout, site: Site) -> Keys:
    """The keys that a block's attention stores.

    Raises:
        UnsupportedError: It stores no keys, or what it stores can't be determined, such as while the model is steered.
    """
    if layout.decoder not in _known:
        if steered_here(layout.decoder):  # this run's hooks would steer the pass
            raise UnsupportedError(
                f"which keys {type(layout.decoder).__name__} stores is determined in a separate pass, which can't run"
                " while the model is steered; call lm.check(steering) first"
            )
        _known[layout.decoder] = _examine(layout)
    examined = _known[layout.decoder][site.layer]
    if isinstance(examined, str):
        raise UnsupportedError(f"{type(layout.decoder).__name__} has no {site}: {examined}; steer the residual stream")
    return examined


# ---- editing keys in a pass ------------------------------------------------------------------------------------


def attach(keys: Keys, change: Change) -> Any:
    """Attach a hook that applies `change` to the keys, with heads concatenated, before they are stored."""

    def before(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        arguments = compat.bind_arguments(attention, args, kwargs)
        name = compat.cache_name(attention)
        cache = arguments.get(name)
        if isinstance(cache, _EditingCache):  # from another hook, which ran first
            cache.changes.append((keys, change))
            return args, kwargs
        cache = _EditingCache(cache, [(keys, change)])
        at = list(compat.parameters(attention)).index(name)
        if at < len(args):
            return (*args[:at], cache, *args[at + 1 :]), kwargs
        return args, {**kwargs, name: cache}

    return keys.attention.register_forward_pre_hook(before, with_kwargs=True)


class _EditingCache:
    """A wrapper of a block's cache that applies changes to the keys before it stores them."""

    def __init__(self, cache: Any, changes: list[tuple[Keys, Change]]) -> None:
        self.cache = _NullCache() if cache is None else cache
        self.changes = changes

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for known, change in self.changes:
            if keys.dim() != 4 or (keys.shape[1], keys.shape[3]) != (known.heads, known.size):
                raise TrimtabError(
                    f"{type(known.attention).__name__} stores keys of shape {tuple(keys.shape)}, and stored"
                    f" {known.heads} heads of size {known.size} before; which keys belong to which head can't be"
                    " determined"
                )
            keys = _changed(keys, change)
        stored: tuple[Tensor, Tensor] = self.cache.update(keys, values, *args, **kwargs)
        return stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


class _NullCache(DynamicCache):
    """A cache that stores nothing, for passes without a cache."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def _changed(keys: Tensor, change: Change) -> Tensor:
    """Apply a change to keys `[rows, heads, tokens, size]`, with heads concatenated. Keeps the memory layout."""
    x = keys.transpose(1, 2).flatten(2)
    new = change(x)
    if new is None and x.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr():
        return keys  # changed in place, through a view
    made = (x if new is None else new).unflatten(-1, keys.shape[1::2]).transpose(1, 2)
    return made if made.requires_grad else torch.empty_like(keys).copy_(made)


# ---- examining which keys a model stores -----------------------------------------------------------------------


@torch.no_grad()
def _examine(layout: Layout) -> tuple[Keys | str, ...]:
    modules = attention_modules(layout)
    stored: list[list[Tensor]] = [[] for _ in modules]
    attended_keys: list[list[Tensor]] = [[] for _ in modules]
    running: list[int] = []

    def enter(number: int, *_: Any) -> None:
        running[:] = [number]

    def attention(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        if running and modules[running[0]] is module:
            attended_keys[running[0]].append(key)
        return compat.attention_function(usual, module)(module, query, key, *args, **kwargs)

    usual = compat.attention_name(layout.decoder.config)
    cache = _RecordingCache(lambda keys: stored[running[0]].append(keys) if running else None)
    ids = torch.arange(1, 1 + ROWS * TOKENS, device=input_device(layout.decoder)).view(ROWS, TOKENS)
    weight = getattr(layout.decoder.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    ids = ids if weight is None else ids % weight.shape[0]
    failed = ""
    with reading(layout.decoder), registered_attention(attention, compat.mask_function(usual)) as name:
        try:
            with ExitStack() as hooks, compat.with_attention_implementation(configurations(layout), name):
                for i, block in enumerate(layout.blocks):
                    hooks.enter_context(block.register_forward_pre_hook(partial(enter, i)))
                for module in {m for m in modules if m is not None}:
                    hooks.enter_context(_record_keys(module, cache))
                layout.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except Exception as error:  # reported, with its reason, when the keys are requested
            failed = f"a pass over a few tokens failed ({type(error).__name__}: {error})"
    if failed:
        return (failed,) * len(modules)
    return tuple(_keys_stored(*observed) for observed in zip(modules, stored, attended_keys, strict=True))


class _RecordingCache(_NullCache):
    def __init__(self, listen: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.listen = listen

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.listen(key_states)
        return key_states, value_states


def _record_keys(attention: nn.Module, cache: Any) -> Any:
    def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        at = list(compat.parameters(attention)).index(compat.cache_name(attention))
        if at < len(args):
            return (*args[:at], cache, *args[at + 1 :]), kwargs
        return args, {**kwargs, compat.cache_name(attention): cache}

    return attention.register_forward_pre_hook(before, with_kwargs=True)


def _keys_stored(module: nn.Module | None, stored: list[Tensor], attended_keys: list[Tensor]) -> Keys | str:
    """The keys that one block stores, or the reason why they can't be steered."""
    if module is None:
        return "the block has no attention that goes through transformers' attention interface"
    if len(stored) != 1 or len(attended_keys) != 1:
        return f"its attention stores keys {len(stored)} times and attends {len(attended_keys)} times in a pass"
    (keys,), (attended,) = stored, attended_keys
    if keys.dim() != 4 or keys.shape[0] != ROWS or keys.shape[2] != TOKENS or not torch.equal(keys, attended):
        return "its attention stores something other than the keys that it attends to (latents, for example)"
    return Keys(module, keys.shape[1], keys.shape[3])
