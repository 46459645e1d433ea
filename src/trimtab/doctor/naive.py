"""Steering computed the plain way: one text, no cache, hooks that do one thing each.

The checks compare trimtab's engine with this. Of the engine it uses only the locations of sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.attention import attention_modules, configurations
from trimtab.engines.transformers.places import Place, place
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import UnsupportedError
from trimtab.lm import LM
from trimtab.steering import Site

Change = Callable[[Tensor], Tensor]
"""A function of one text's activations `[tokens, width]`."""
NAME = "trimtab-doctor"


@torch.no_grad()
def logits(lm: LM, ids: Sequence[int]) -> Tensor:
    """The next token's logits `[vocabulary]` after a text, in float32 or wider."""
    inputs = torch.tensor([list(ids)], device=input_device(lm.model))
    last: Tensor = lm.model(input_ids=inputs, use_cache=False).logits[0, -1]
    return last.to(torch.promote_types(last.dtype, torch.float32))


@contextmanager
def changed(lm: LM, changes: Mapping[Site, Change]) -> Iterator[None]:
    """Apply these changes at these sites while the context is open; one text at a time is run."""
    with ExitStack() as stack:
        for site, change in changes.items():
            stack.callback(hook(lm, site, change).remove)
        yield


def hook(lm: LM, site: Site, change: Change) -> Any:
    """Register a hook that applies a change at a site; the returned handle has `remove`."""
    where = place(lm.layout, site)
    if where.side == "logits":
        return _Logits(where, change_rows(change))
    apply = (lambda x: _on_streams(lm, x, change)) if site.kind in ("residual", "block_input") else change_rows(change)

    if where.side == "output":

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return apply(output)
            return type(output)([apply(output[0]), *output[1:]]) if isinstance(output, (tuple, list)) else output

        return where.module.register_forward_hook(after)

    def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (apply(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": apply(kwargs["hidden_states"])}

    return where.module.register_forward_pre_hook(before, with_kwargs=True)


class _Logits(TorchFunctionMode):
    """A change of a router's logits until it is removed.

    It intercepts the product with the router's weight while the router runs. The mode acts only in the router's own
    thread, so that products of other threads aren't touched.
    """

    def __init__(self, where: Place, apply: Change) -> None:
        super().__init__()
        self.weight: Any = where.module.weight
        self.apply = apply
        self.handles = [
            where.module.register_forward_pre_hook(self.enter),
            where.module.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, *_: Any) -> None:
        self.__enter__()

    def leave(self, *_: Any) -> None:
        self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        product = func is torch.nn.functional.linear
        return self.apply(result) if product and args[1].shape == self.weight.shape else result

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def change_rows(change: Change) -> Change:
    """The change for a tensor of one text, of any shape; its last axis is the activation."""
    return lambda x: change(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def stream(lm: LM, x: Tensor) -> Tensor:
    """The residual stream `[tokens, width]` of one text in a block's output: the active stream, or the mean of all."""
    width = lm.layout.width
    if x.dim() == 3:
        return x[0] if x.shape[-1] == width else torch.stack(x[0].split(width, -1)).mean(0)
    active = compat.active_stream(lm.layout.decoder.config)
    if x.shape[0] == 1 and active is None:
        return x[0].mean(1)
    return x[active or 0, 0]


def _on_streams(lm: LM, x: Tensor, change: Change) -> Tensor:
    old = stream(lm, x)
    step = change(old.clone()) - old
    width = lm.layout.width
    if x.dim() == 3:
        return x + step.repeat(1, x.shape[-1] // width)[None]
    active = compat.active_stream(lm.layout.decoder.config)
    if active is None:
        return x + step[None, :, None]
    moved = x.clone()
    moved[active, 0] += step
    return moved


@torch.no_grad()
def activations(lm: LM, ids: Sequence[int], sites: Sequence[Site]) -> dict[Site, Tensor]:
    """The activations `[tokens, size]` of one text, as separate hooks see them."""
    by_site: dict[Site, Tensor] = {}

    def keep(site: Site) -> Change:
        def look(x: Tensor) -> Tensor:
            by_site[site] = x.clone()
            return x

        return look

    with changed(lm, {site: keep(site) for site in sites}):
        logits(lm, ids)
    return by_site


@torch.no_grad()
def logits_with_scaled_keys(
    lm: LM, ids: Sequence[int], factors: Mapping[int, float], span: tuple[int, int], last: bool
) -> Tensor:
    """The next token's logits when keys of `span` are multiplied at these layers, by the model's own eager attention.

    With `last`, this is done only for the last query, and not at its own column.
    """
    modules = attention_modules(lm.layout)
    running: list[int] = []
    seen: set[int] = set()

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any
    ) -> Any:
        eager = compat.attention_function("eager", module)
        if attention_mask is None and query.shape[2] > 1:
            hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
            attention_mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill(
                hidden, torch.finfo(query.dtype).min
            )
            attention_mask = attention_mask[None, None]
        try:
            output, weights = eager(module, query, key, value, attention_mask, **more)
        except RuntimeError:  # some models' eager attention doesn't repeat keys for grouped queries, as sdpa does
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
            output, weights = eager(module, query, key, value, attention_mask, **more)
        layer = running[-1] if running else None
        if layer is None or modules[layer] is not module or layer not in factors:
            return output, weights
        seen.add(layer)
        stop = min(span[1], key.shape[2] - 1) if last else span[1]
        scaled = key.clone()
        scaled[:, :, span[0] : stop] *= factors[layer]
        other, _ = eager(module, query, scaled, value, attention_mask, **more)
        if last:
            output = output.clone()
            output[:, -1] = other[:, -1]
            return output, weights
        return other, weights

    blocks = enumerate(lm.layout.blocks)
    handles = [block.register_forward_pre_hook(lambda *_, i=i: running.append(i)) for i, block in blocks]
    try:
        with (
            compat.registered_attention(NAME, attention, compat.mask_function("eager")),
            compat.with_attention_implementation(configurations(lm.layout), NAME),
        ):
            steered = logits(lm, ids)
    finally:
        for handle in handles:
            handle.remove()
    if missing := set(factors) - seen:
        raise UnsupportedError(
            f"the attention of layer {min(missing)} never looked up the attention function that the configuration names"
        )
    return steered
