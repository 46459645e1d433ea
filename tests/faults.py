"""Faults planted into a model: what a captured graph, a replaced forward or a renamed argument does to hooks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from trimtab.engines.transformers import compat

OUTPUT_CACHE = next(f.name for f in fields(CausalLMOutputWithPast) if f.name in compat.CACHE_NAMES)


@contextmanager
def deaf(module: nn.Module, passes: range | None = None) -> Iterator[None]:
    """While open, calls of this module don't call its hooks, as if a captured graph ran it.

    `passes` are the numbers of the calls that are deaf, from 0; all by default.
    """
    own: Any = type(module)
    calls = 0

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if passes is None or calls - 1 in passes:
            return self.forward(*args, **kwargs)
        return own.__call__(self, *args, **kwargs)

    module.__class__ = type(own.__name__, (own,), {"__call__": call, "__module__": own.__module__})
    try:
        yield
    finally:
        module.__class__ = own


class Memory:
    """A past of a kind that nobody knows."""

    def __init__(self, cache: Any) -> None:
        self.hidden = [cache]


@contextmanager
def renamed_cache(model: Any, *, wrapped: bool = False) -> Iterator[None]:
    """While open, a Llama's decoder takes its cache as `kv`; `wrapped`: and as something that is no `Cache`."""
    decoder = model.get_decoder()
    outer, inner = type(model), type(decoder)
    name = compat.cache_name(decoder)

    class Inner(inner):  # type: ignore[misc, valid-type]
        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            kv: Cache | None = None,
            inputs_embeds: Tensor | None = None,
            use_cache: bool | None = None,
        ) -> Any:
            memory: Any = kv.hidden[0] if isinstance(kv, Memory) else kv
            return inner.forward(
                self, input_ids, attention_mask, position_ids, memory, inputs_embeds=inputs_embeds, use_cache=use_cache
            )

    class Outer(outer):  # type: ignore[misc, valid-type]
        @wraps(outer.forward)  # the whole model keeps its name for it
        def forward(self, input_ids: Tensor | None = None, logits_to_keep: int = 0, **more: Any) -> Any:
            cache = more.pop(name, None)
            for unused in ("return_dict", "labels", "inputs_embeds"):
                more.pop(unused, None)
            output = self.model(input_ids, kv=Memory(cache) if wrapped and cache is not None else cache, **more)
            logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
            return CausalLMOutputWithPast(logits=logits, **{OUTPUT_CACHE: cache})

    decoder.__class__, model.__class__ = Inner, Outer
    try:
        yield
    finally:
        decoder.__class__, model.__class__ = inner, outer


@contextmanager
def own_attention(module: Any) -> Iterator[None]:
    """While open, this attention reads its implementation's name from a configuration of its own."""
    shared = module.config
    module.config = copy.copy(shared)
    module.config._attn_implementation = "eager" if compat.attention_name(shared) == "sdpa" else "sdpa"
    real = type(module.config)

    class Fixed(real):  # type: ignore[misc, valid-type]
        @property
        def _attn_implementation(self) -> str:
            return "eager"

        @_attn_implementation.setter
        def _attn_implementation(self, _value: str) -> None:
            pass

    module.config.__class__ = Fixed
    try:
        yield
    finally:
        module.config = shared


@contextmanager
def forgetful(model: Any) -> Iterator[None]:
    """While open, the model's decoder leaves the cache that it is given as it is."""
    decoder = model.get_decoder()
    own = decoder.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs_left = {name: value for name, value in kwargs.items() if not compat.is_cache(value)}
        return own(*args, **kwargs_left)

    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward
