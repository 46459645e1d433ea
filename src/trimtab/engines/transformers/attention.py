"""Attention with steered scores, through transformers' attention interface.

While a run is open, the decoder's configuration names an attention of our own, registered for this run only; the
model's own implementation is put back however the run ends. Layers and requests that aren't steered are computed by
the model's own implementation, so that they stay as they were to the bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.positions import read_pass
from trimtab.engines.transformers.scores import LayerScores, Row, compile_scores
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit

FULL = {"full_attention", "sliding_attention"}
PLAIN = ("eager", "sdpa")
UNKNOWN = ("s_aux", "position_bias", "head_mask")  # what changes scores in ways that steering them doesn't know
_numbers = itertools.count()

Attention = Callable[..., tuple[Tensor, Any]]


def check_attention(layout: Layout) -> None:
    """Raises `UnsupportedError` for a model whose attention scores can't be steered."""
    decoder: Any = layout.decoder
    name = type(decoder).__name__
    if not compat.calls_attention_interface(decoder):
        raise UnsupportedError(f"{name} computes its attention outside of transformers' attention interface")
    kinds = set(getattr(decoder.config, "layer_types", None) or ())
    if other := sorted(kinds - FULL):
        raise UnsupportedError(f"attention scores can't be steered in {name}, which has layers of {', '.join(other)}")
    if getattr(decoder.config, "alibi", False):
        raise UnsupportedError(f"{name} adds position biases to its scores, which steering them doesn't know")
    if getattr(decoder.config, "attn_logit_softcapping", None) and compat.attention_name(decoder.config) == "sdpa":
        raise UnsupportedError(
            f"{name} caps its scores, and the sdpa attention it was loaded with leaves that out; load it with"
            " attn_implementation='eager'"
        )


def attention_modules(layout: Layout) -> tuple[nn.Module, ...]:
    """Each block's attention, as the model declares it. Raises `UnsupportedError` where that isn't one a block."""
    kind = compat.declared(layout.decoder, "attentions")
    if kind is None:
        raise UnsupportedError(f"{type(layout.decoder).__name__} doesn't declare what its attention is")
    found = [[m for m in block.modules() if isinstance(m, kind)] for block in layout.blocks]
    if any(len(modules) != 1 for modules in found):
        raise UnsupportedError(f"{type(layout.decoder).__name__} has blocks without one {kind.__name__}")
    return tuple(modules[0] for modules in found)


def head_count(layout: Layout) -> int:
    """How many query heads a layer has."""
    return int(layout.decoder.config.num_attention_heads)  # type: ignore[union-attr, arg-type]


@contextmanager
def registered(attention: Attention, mask: Callable[..., Any]) -> Iterator[str]:
    """A name under which transformers knows this attention, and how its masks are made, while the context is open."""
    name = f"trimtab-{next(_numbers)}"
    with compat.registered(name, attention, mask):
        yield name


def configurations(layout: Layout) -> list[Any]:
    """The configurations that the decoder's modules read their attention's name from, each once."""
    found = [m.config for m in layout.decoder.modules() if hasattr(m, "config")]
    return list({id(config): config for config in found}.values())


@contextmanager
def attending(layout: Layout, edits: Sequence[tuple[Edit, ...]], lengths: Sequence[int]) -> Iterator[None]:
    """While open, each request's attention is steered by its edits of scores, in `generate` and its like.

    `lengths` are those of the prompts, in tokens; the batch pads them on the left. Nothing happens without edits.
    """
    if not any(edits):
        yield
        return
    check_attention(layout)
    width = max(lengths)
    rows = [Row(tuple(one), length, width - length) for one, length in zip(edits, lengths, strict=True)]
    layers = compile_scores(rows, width, head_count(layout), torch.device("cpu"))
    columns: int | None = None
    owner = get_ident()

    def count(decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal columns
        if get_ident() == owner:
            columns = read_pass(decoder, compat.bound(decoder, args, kwargs), None, columns).stop

    handle = layout.decoder.register_forward_pre_hook(count, with_kwargs=True)
    try:
        with steered_scores(layout, layers, lambda: columns or 0):
            yield
    finally:
        handle.remove()


@contextmanager
def steered_scores(
    layout: Layout,
    layers: dict[int, LayerScores],
    columns: Callable[[], int],
    masks: Callable[..., Tensor | None] | None = None,
) -> Iterator[None]:
    """While open, attention to a batch's prompts is steered at these layers, for all queries.

    `columns()` says how many columns a row has so far, pads and those of the running pass included. Passes of other
    threads are left alone. `masks` makes the masks; by default what the model's own attention has for it.

    Raises:
        TrimtabError: A pass has ended in which a layer to be steered didn't ask for this attention, or there was none.
    """
    check_attention(layout)
    own = compat.attention_name(layout.decoder.config)
    if own not in PLAIN:
        raise UnsupportedError(f"attention scores can't be steered under {own}; load the model with sdpa or eager")
    at = {id(module): layers[i] for i, module in enumerate(attention_modules(layout)) if i in layers}
    owner = get_ident()
    asked: set[int] = set()  # the modules that have asked for this attention in the pass that is running
    passes = 0
    running = False
    # for a layer's scores, a batch of so many rows, and where the layer is
    chosen: dict[tuple[int, int, torch.device], tuple[Tensor, LayerScores]] = {}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
    ) -> tuple[Tensor, Any]:
        count = len(query)
        steered = at.get(id(module)) if get_ident() == owner else None
        asked.add(id(module))
        if steered is not None and not running:
            raise TrimtabError("the model ran past trimtab's hooks, which tell its tokens' positions to its attention")
        rows: Tensor | None = None
        if steered is not None:
            place = id(steered), count, query.device
            if place not in chosen:
                chosen[place] = steered.steered_rows(count, query.device)
            rows, steered = chosen[place]
            if len(rows) == count:
                return _steered_attention(query, key, value, mask, steered, columns(), given), None
        plain = compat.attention_function(own, module)
        if given.get("softcap") is None and own == "sdpa":
            given.pop("softcap", None)
        output, weights = plain(module, query, key, value, mask, **given)
        if steered is None or rows is None or not len(rows):
            return output, weights
        inputs = (query[rows], key[rows], value[rows], _rows_of(mask, rows))
        output = output.clone()
        output[rows] = _steered_attention(*inputs, steered, columns(), given)
        return output, None

    def begin(*_: Any) -> None:
        nonlocal running
        if get_ident() == owner:
            running = True
            asked.clear()

    def end(*_: Any) -> None:
        nonlocal passes, running
        if get_ident() != owner:
            return
        passes, running = passes + 1, False
        if missing := [i for i, module in enumerate(attention_modules(layout)) if id(module) in at.keys() - asked]:
            raise TrimtabError(
                f"the attention of layer {missing[0]} wasn't steered in this pass: it doesn't look up the attention"
                " that the model's configuration names"
            )

    with (
        registered(attention, masks or compat.mask_function(own)) as name,
        compat.attending_with(configurations(layout), name),
    ):
        hooks = [
            layout.decoder.register_forward_pre_hook(begin),
            layout.decoder.register_forward_hook(end),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
    if not passes:
        raise TrimtabError("the model ran past trimtab's hooks, so its attention wasn't steered")


def refuse_unknown(given: dict[str, Any]) -> None:
    """Raises `UnsupportedError` for an attention with parts that steering its scores doesn't know."""
    for name in UNKNOWN:
        if given.get(name) is not None:
            raise UnsupportedError(f"attention with {name} can't be steered")


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores after the model's soft cap (Gemma 2)."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _rows_of(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    return mask if mask is None or mask.shape[0] == 1 else mask[rows.to(mask.device)]


def _steered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    steered: LayerScores,
    columns: int,
    given: dict[str, Any],
) -> Tensor:
    """The output `[rows, queries, heads, size]` for queries `[rows, heads, queries, size]`, scores in full."""
    refuse_unknown(given)
    count, heads, queries, size = query.shape
    groups, length = key.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    scaling = given.get("scaling")
    scaling = size**-0.5 if scaling is None else scaling
    scores = query.reshape(count, groups, -1, size) @ key.transpose(-1, -2)
    scores = scores.view(count, heads, queries, length).to(wide).mul_(scaling)
    missing = columns - length
    if missing < 0:
        raise UnsupportedError(
            f"attention can't be steered over a cache that has {length} columns for {columns} tokens (a static cache);"
            " leave out cache_implementation"
        )
    steered.scale(scores, missing)
    scores = capped(scores, given.get("softcap"))
    if mask is None and queries > 1:
        mask = torch.ones(queries, length, dtype=torch.bool, device=query.device).tril(length - queries)[None, None]
    if mask is not None:
        mask = mask[..., :length]
        scores = scores.masked_fill(~mask if mask.dtype == torch.bool else mask < -1, -torch.inf)
    if queries > 1:
        empty = scores.isneginf().all(-1, keepdim=True)  # a pad's query sees nothing
        scores = scores.masked_fill(empty, 0)
    steered.shift(scores, missing)
    weights = scores.softmax(-1).to(value.dtype)
    output = weights.view(count, groups, -1, length) @ value
    return output.view(count, heads, queries, -1).transpose(1, 2)
