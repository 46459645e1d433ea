"""Attention with steered scores, through transformers' attention interface.

During a run, the decoder's configuration names trimtab's own attention function, which is registered for this run only.
The model's implementation is restored when the run ends, also after an error. Layers and requests that aren't steered
are computed by the model's implementation, so their results are bit-exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.anatomy import block_of
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.positions import read_pass
from trimtab.engines.transformers.scores import LayerScores, ScoredRow, compile_scores
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit

SUPPORTED_IMPLEMENTATIONS = ("eager", "sdpa")
SUPPORTED_PARAMETERS = {
    "module",
    "query",
    "key",
    "value",
    "attention_mask",
    "scaling",
    "dropout",
    "softcap",
    "sliding_window",
} | {
    "position_bias",
    "sinks",
    "s_aux",
    "kwargs",
}
"""The parameters of attention functions that score steering supports."""
BY_ROW = ("position_bias", "sinks", "s_aux")
"""Those of them that may differ between rows."""
_numbers = itertools.count()


@dataclass(frozen=True)
class _Attentions:
    """The result of a walk over all modules: each block's attention, its name in the block, and all configurations."""

    modules: tuple[nn.Module | None, ...]
    names: tuple[str, ...]
    configurations: list[Any]

    def hold(self, blocks: Sequence[nn.Module]) -> bool:
        """Whether these modules are still in the same places."""
        if len(blocks) != len(self.modules):
            return False
        places = zip(blocks, self.modules, self.names, strict=True)
        return all(module is None or _module_at(block, name) is module for block, module, name in places)


_known: WeakKeyDictionary[nn.Module, dict[str, _Attentions]] = WeakKeyDictionary()
"""Cache by decoder and path, since this is looked up for every token."""

Attention = Callable[..., tuple[Tensor, Any]]


def check_attention(layout: Layout, layers: Iterable[int] = ()) -> None:
    """Raises `UnsupportedError` if the model's attention scores can't be steered, or not at these layers."""
    decoder: Any = layout.decoder
    name = type(decoder).__name__
    attention_layers = [i for i, module in enumerate(attention_modules(layout)) if module is not None]
    if not attention_layers:
        parts = {type(m).__name__ for block in layout.blocks for m in block.modules()}
        if any("attention" in part.lower() or "attn" in part.lower() for part in parts):
            raise UnsupportedError(f"{name} computes its attention outside of transformers' attention interface")
        raise UnsupportedError(f"{name} has no attention, so there are no scores to steer")
    if getattr(decoder.config, "alibi", False):
        raise UnsupportedError(f"{name} adds position biases to its scores, which score steering doesn't support")
    if getattr(decoder.config, "attn_logit_softcapping", None) and compat.attention_name(decoder.config) == "sdpa":
        raise UnsupportedError(
            f"{name} caps its scores, and the sdpa attention it was loaded with leaves that out; load it with"
            " attn_implementation='eager'"
        )
    looped = [layer for layer in layers if layer < layout.layers and block_of(layout, layer).runs > 1]
    if looped:
        raise UnsupportedError(f"{name} runs layer {looped[0]} several times in a pass, so its scores aren't unique")
    if without := sorted(set(layers) - set(attention_layers)):
        raise UnsupportedError(
            f"{name} has no attention at layer {without[0]}, so there are no scores to steer; its attention layers are"
            f" {', '.join(map(str, attention_layers))}"
        )


def score_layers(layout: Any) -> tuple[int, ...]:
    """The layers whose attention scores can be steered; in a hybrid model, those with attention.

    All layers if none has attention, so that a later check can say why, or if the layout is another engine's.
    """
    modules = attention_modules(layout) if isinstance(layout, Layout) else ()
    attention_layers = tuple(i for i, module in enumerate(modules) if module is not None)
    return attention_layers or tuple(range(layout.layers))


def attention_modules(layout: Layout) -> tuple[nn.Module | None, ...]:
    """Each block's attention module that uses transformers' attention interface; `None` for blocks without one.

    Hybrid models have blocks without attention; in some, several blocks share one attention module (Zamba 2).

    Raises:
        UnsupportedError: A block has several, and the model doesn't declare which one attends to the text.
    """
    return _attentions(layout).modules


def _attentions(layout: Layout) -> _Attentions:
    by_path = _known.setdefault(layout.decoder, {})
    if layout.path not in by_path or not by_path[layout.path].hold(layout.blocks):
        each = [_attention_in(layout, block) for block in layout.blocks]
        configs = [m.config for m in layout.decoder.modules() if hasattr(m, "config")]
        by_path[layout.path] = _Attentions(
            tuple(module for _, module in each),
            tuple(name for name, _ in each),
            list({id(config): config for config in configs}.values()),
        )
    return by_path[layout.path]


def _module_at(block: nn.Module, name: str) -> nn.Module | None:
    module: Any = block
    for part in name.split(".") if name else ():
        module = getattr(module, part, None)
    return module


def _attention_in(layout: Layout, block: nn.Module) -> tuple[str, nn.Module | None]:
    candidates = {
        name: m
        for name, m in block.named_modules()
        if compat.calls_attention_interface(m) and not compat.is_cross_attention(m)
    }
    if len(candidates) > 1 and (kinds := compat.declared(layout.decoder, "attentions")):
        candidates = {name: m for name, m in candidates.items() if isinstance(m, kinds)} or candidates
    if len(candidates) > 1 and (called := compat.declared_name(layout.decoder, "attentions")):
        candidates = {name: m for name, m in candidates.items() if name.split(".")[-1] == called} or candidates
    if len(candidates) > 1:
        raise UnsupportedError(
            f"{type(layout.decoder).__name__} has several attentions in a block ({', '.join(candidates)}), and doesn't"
            " declare which of them attends to the text"
        )
    return next(iter(candidates.items()), ("", None))


def head_count(layout: Layout) -> int:
    """The number of query heads per layer; 1 if it isn't the same in all layers, so that heads can't be selected."""
    return layout.heads or 1


@contextmanager
def registered_attention(attention: Attention, mask: Callable[..., Any]) -> Iterator[str]:
    """Register an attention function and its mask function with transformers; yields the name they go by."""
    name = f"trimtab-{next(_numbers)}"
    with compat.registered_attention(name, attention, mask):
        yield name


def configurations(layout: Layout) -> list[Any]:
    """The distinct configurations from which the decoder's modules read the name of their attention function."""
    return _attentions(layout).configurations


@contextmanager
def steered_request_scores(layout: Layout, edits: Sequence[tuple[Edit, ...]], lengths: Sequence[int]) -> Iterator[None]:
    """Steer each request's attention with its score edits while the context is open, for `generate` and similar loops.

    `lengths` are the prompt lengths in tokens; the batch has left padding. Without edits this does nothing.
    """
    if not any(edits):
        yield
        return
    check_attention(layout)
    width = max(lengths)
    rows = [
        ScoredRow(tuple(row_edits), length, width - length) for row_edits, length in zip(edits, lengths, strict=True)
    ]
    layers = compile_scores(rows, width, head_count(layout), torch.device("cpu"))
    columns: int | None = None
    owner = get_ident()

    def count(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal columns
        if get_ident() == owner:
            columns = read_pass(decoder, compat.bind_arguments(decoder, args, kwargs), None, columns).stop

    hook = layout.decoder.register_forward_pre_hook(count, with_kwargs=True)
    with hook, steered_scores(layout, layers, lambda: columns or 0):
        yield


@contextmanager
def steered_scores(
    layout: Layout,
    layers: dict[int, LayerScores],
    columns: Callable[[], int],
    masks: Callable[..., Tensor | None] | None = None,
    *,
    excluded_columns: int = 0,
) -> Iterator[None]:
    """Steer attention to a batch's prompts at these layers, for all queries, while the context is open.

    `columns()` returns the number of columns so far, including pads and the columns of the current pass. The last
    `excluded_columns` columns aren't steered, nor are passes of other threads. `masks` is the mask function; default:
    the one that the model's own attention uses.

    Raises:
        TrimtabError: In some pass a layer to be steered didn't call this attention, or there was no pass.
    """
    check_attention(layout, layers)
    usual = compat.attention_name(layout.decoder.config)
    if usual not in SUPPORTED_IMPLEMENTATIONS:
        raise UnsupportedError(
            f"attention scores can't be steered with {usual} attention; load the model with sdpa or eager"
        )
    modules = attention_modules(layout)
    owner = get_ident()
    own_layer = {module: i for i, module in enumerate(modules) if module is not None}
    shared = len(own_layer) < sum(module is not None for module in modules)
    layer: int | None = None  # the current block, if some blocks share one attention module
    called: set[int] = set()  # the layers that have called this attention in the current pass
    passes = 0
    running = False
    # by a layer's scores, the batch size and the layer's device
    chosen: dict[tuple[int, int, torch.device], tuple[Tensor, LayerScores]] = {}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        count, mask = len(query), attention_mask
        if get_ident() == owner and not running and any(module is modules[i] for i in layers):
            raise TrimtabError("the model bypassed trimtab's hooks, which pass token positions to its attention")
        steered = None
        here = layer if shared else own_layer.get(module)
        if get_ident() == owner and here is not None and modules[here] is module:
            steered = layers.get(here)
            called.add(here)
        rows: Tensor | None = None
        if steered is not None:
            place = id(steered), count, query.device
            if place not in chosen:
                chosen[place] = steered.steered_rows(count, query.device)
            rows, steered = chosen[place]
            if len(rows) == count:
                return _steered_attention(
                    module, query, key, value, mask, steered, columns(), excluded_columns, kwargs
                ), None
        plain = compat.attention_function(usual, module)
        if kwargs.get("softcap") is None and usual == "sdpa":
            kwargs.pop("softcap", None)
        output, weights = plain(module, query, key, value, mask, **kwargs)
        if steered is None or rows is None or not len(rows):
            return output, weights
        inputs = (query[rows], key[rows], value[rows], _rows_of(mask, rows))
        by_row = {name: _rows_of(tensor, rows) if name in BY_ROW else tensor for name, tensor in kwargs.items()}
        output = output.clone()
        output[rows] = _steered_attention(module, *inputs, steered, columns(), excluded_columns, by_row)
        return output, None

    def begin(*_: Any) -> None:
        nonlocal running
        if get_ident() == owner:
            running = True
            called.clear()

    def enter(number: int, *_: Any) -> None:
        nonlocal layer
        if get_ident() == owner:
            layer = number

    def end(*_: Any) -> None:
        nonlocal passes, running, layer
        if get_ident() != owner:
            return
        passes, running, layer = passes + 1, False, None
        if missing := sorted(layers.keys() - called):
            raise TrimtabError(
                f"the attention of layer {missing[0]} wasn't steered in this pass: it doesn't use the attention"
                " function that the model's configuration names"
            )

    with (
        registered_attention(attention, masks or compat.mask_function(usual)) as name,
        compat.with_attention_implementation(configurations(layout), name),
        layout.decoder.register_forward_pre_hook(begin),
        layout.decoder.register_forward_hook(end),
        ExitStack() as hooks,
    ):
        for i, block in enumerate(layout.blocks if shared else ()):
            hooks.enter_context(block.register_forward_pre_hook(partial(enter, i)))
        yield
    if not passes:
        raise TrimtabError("the model bypassed trimtab's hooks, so its attention wasn't steered")


def refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raises `UnsupportedError` if the attention was given an argument that score steering doesn't support."""
    for name in compat.attention_parameters(module) - SUPPORTED_PARAMETERS:
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"{type(module).__name__} has {name}: its scores can't be steered")


def with_sinks(scores: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, int]:
    """Scores `[rows, heads, queries, columns]` with the attention sinks appended as columns, and the number of sinks.

    A sink takes attention weight and contributes no value. There is one per head (gpt-oss), or one per query.
    """
    sinks = kwargs.get("s_aux") if kwargs.get("s_aux") is not None else kwargs.get("sinks")
    if sinks is None:
        return scores, 0
    sinks = sinks.view(1, -1, 1, 1) if sinks.dim() == 1 else sinks
    sinks = sinks.to(scores.dtype).expand(*scores.shape[:3], -1)
    return torch.cat([scores, sinks], -1), sinks.shape[-1]


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores after the model's soft cap (Gemma 2)."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _rows_of(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    """Select rows of a tensor `[rows or 1, heads or 1, …]`; one without a row axis (one number per head) is kept."""
    return tensor if tensor is None or tensor.dim() < 4 or tensor.shape[0] == 1 else tensor[rows.to(tensor.device)]


def _steered_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    steered: LayerScores,
    columns: int,
    excluded_columns: int,
    kwargs: dict[str, Any],
) -> Tensor:
    """The attention output `[rows, queries, heads, size]` for queries `[rows, heads, queries, size]`.

    The scores are materialized, in float32 at least.
    """
    refuse_unknown(module, kwargs)
    count, heads, queries, size = query.shape
    groups, length = key.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    scaling = kwargs.get("scaling")
    scaling = size**-0.5 if scaling is None else scaling
    scores = query.reshape(count, groups, -1, size) @ key.transpose(-1, -2)
    scores = scores.view(count, heads, queries, length).to(wide).mul_(scaling)
    missing = columns - length
    if missing < 0:
        raise UnsupportedError(
            f"attention can't be steered over a cache that has {length} columns for {columns} tokens, so trimtab can't"
            " determine which columns belong to the tokens (this is a static cache, from cache_implementation, or a"
            " compressed one)"
        )
    steered.scale(scores, missing, excluded_columns)
    if kwargs.get("position_bias") is not None:
        scores += kwargs["position_bias"][..., -length:]
    scores = capped(scores, kwargs.get("softcap"))
    if mask is None and queries > 1:
        mask = torch.ones(queries, length, dtype=torch.bool, device=query.device).tril(length - queries)[None, None]
    if mask is not None:
        mask = mask[..., :length]
        if mask.dtype == torch.bool:
            unseen = ~mask
        else:  # an additive mask; some models also use it to weight visible tokens
            unseen = mask <= torch.finfo(mask.dtype).min / 2
            scores = scores + mask
        scores = scores.masked_fill(unseen, -torch.inf)
    if queries > 1:
        empty = scores.isneginf().all(-1, keepdim=True)  # queries of pads, for which everything is masked
        scores = scores.masked_fill(empty, 0)
    scores, sinks = with_sinks(scores, kwargs)
    steered.shift(scores, missing, excluded_columns + sinks)
    weights = scores.softmax(-1)[..., :length].to(value.dtype)
    output = weights.reshape(count, groups, -1, length) @ value
    return output.view(count, heads, queries, -1).transpose(1, 2).contiguous()
