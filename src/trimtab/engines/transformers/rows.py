"""Rows: several versions of the token that is being decoded, in one forward pass over one shared KV cache.

A row is one request's newest token under one steering. All rows are queries in one batch entry. Each attends to the
cache of its request, which it shares with the request's other rows, and to itself. The cache isn't copied, and a row's
own key and value are discarded, except for unsteered rows.

The pass may also contain draft tokens: unsteered rows for the token *after* the newest. If a draft token is accepted,
the unsteered pass of the next step is already done (see `Drafts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.engines.folding import Active, Stage, States, apply
from trimtab.engines.meanings import NOTHING, ActiveMeanings
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.attention import (
    capped,
    check_attention,
    configurations,
    head_count,
    refuse_unknown,
    registered_attention,
    with_sinks,
)
from trimtab.engines.transformers.compat import DynamicCache, sdpa_mask
from trimtab.engines.transformers.drafts import Drafts, entries
from trimtab.engines.transformers.hooks import Hooks
from trimtab.engines.transformers.layout import Layout, stream_dtype
from trimtab.engines.transformers.places import attach, place
from trimtab.engines.transformers.plan import Plan, compile_plan
from trimtab.engines.transformers.positions import state_at
from trimtab.engines.transformers.scores import LayerScores, ScoredRow, activation_edits, compile_scores, score_edits
from trimtab.engines.transformers.shared_past import queries_by_keys, weights_by_values
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit, Site
from trimtab.steering.operations import Rows as Gathered

KEPT_PATTERNS = 64
"""The number of row patterns whose prepared tensors are cached, as the same patterns recur."""


class _RowCache(DynamicCache):
    """The cache object for a pass of rows: only unsteered rows are appended to the unsteered cache."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.layers = run.cache.layers
        self.run = run

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        run = self.run
        if run.raw_rows is not None:
            raw = run.tensor(run.raw_rows, key_states.device)
            run.past = run.cache.update(*entries(key_states, value_states, raw), layer_idx)
        else:
            run.past = cached_keys_values(run.cache, layer_idx, run.columns)
        if run.drafts is not None:
            first = run.rows - len(run.drafts.ids)
            run.drafts.states[layer_idx] = key_states[:, :, first:], value_states[:, :, first:]
        run.layer = layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.run.columns - 1

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.run.columns - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.run.columns - 1 + query_length, 0


@dataclass
class _Run:
    """One pass: the request of each row, and the edits."""

    cache: Any  # the unsteered cache
    rows: int
    columns: int  # of the cache, including the token that is being decoded and padding
    spans: list[tuple[int, slice]]  # a request and adjacent rows of it
    tensor: Callable[[tuple[int, ...], torch.device], Tensor]  # a cached device tensor of these integers
    requests: tuple[int, ...]  # of each row
    padding: Tensor | None  # [requests, columns]
    scores: dict[int, LayerScores]
    states: tuple[int, ...] | None  # of each row, for edits of activations
    raw_rows: tuple[int, ...] | None
    drafts: Drafts | None
    layer: int | None = None
    past: tuple[Tensor, Tensor] | None = None  # the cached keys and values that this layer's rows attend to
    attended: set[int] = field(default_factory=set)  # the layers that have called our attention
    edited: set[Site] = field(default_factory=set)  # the sites whose hooks have run

    @property
    def ahead(self) -> tuple[int, ...]:
        """For each row, 1 if it is a draft token, else 0."""
        drafts = 0 if self.drafts is None else len(self.drafts.ids)
        return (0,) * (self.rows - drafts) + (1,) * drafts


@dataclass(frozen=True)
class NewestTokens:
    """The newest token of each request of a batch: its id and position id, both `[requests, 1]`.

    Without position ids the model computes them itself; this doesn't work for rows over one shared cache.
    """

    ids: Tensor
    positions: Tensor | None
    mask: Tensor | None  # [requests, columns], 0 at padding; `None` without padding

    def rows(self, picked: Tensor, drafts: Drafts | None = None) -> dict[str, Tensor]:
        """The inputs `[1, rows]` of a pass with one row for each request in `picked` (`[rows]`), draft tokens last."""
        if self.positions is None:
            raise UnsupportedError("rows that share one cache need a model that takes position_ids")
        count = len(picked) - (0 if drafts is None else len(drafts.ids))
        ids, positions = self.ids[picked[:count]], self.positions[picked]
        if drafts is not None:
            ids = torch.cat([ids, torch.tensor(drafts.ids, device=self.ids.device)[:, None]])
            positions[count:] += 1
        return {"input_ids": ids.transpose(0, 1), "position_ids": positions.transpose(0, 1)}


@dataclass(frozen=True)
class Versions:
    """The versions that rows can have: for each steering of a batch, its request and its compiled edits.

    `sites` are the sites whose activations a version edits.
    """

    requests: tuple[int, ...]
    scores: dict[int, LayerScores]
    plan: Plan
    pads: tuple[int, ...]
    padded: bool  # whether any prompt of the batch is padded
    _selected: dict[tuple[int | None, ...], dict[int, LayerScores]] = field(default_factory=dict, init=False)
    _prepared: dict[Any, list[tuple[Stage, Gathered, Active]]] = field(default_factory=dict, init=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(sorted(self.plan.stages))

    def select(self, chosen: tuple[int | None, ...]) -> dict[int, LayerScores]:
        """Each layer's score edits for rows of these versions (`None`: unsteered), on the CPU."""
        if chosen not in self._selected:
            clear_if_full(self._selected)
            self._selected[chosen] = _select(self.scores, chosen)
        return self._selected[chosen]

    def prepare(self, site: Site, states: tuple[int, ...], x: Tensor) -> list[tuple[Stage, Gathered, Active]]:
        """The prepared edits at a site for rows in these states, on the device and in the dtype of `x`."""
        key = site, states, x.device, x.dtype
        if key not in self._prepared:
            clear_if_full(self._prepared, len(self.plan.stages))
            tokens = States.of(torch.tensor(states), x.device)
            self._prepared[key] = [(stage, *stage.prepare(tokens, x.dtype)) for stage in self.plan.stages[site]]
        return self._prepared[key]


def compile_versions(
    layout: Layout, versions: Sequence[tuple[int, tuple[Edit, ...]]], lengths: Sequence[int], pads: Sequence[int]
) -> Versions:
    """Compile versions, given as `(request, edits)`, for a batch whose prompts have these lengths and left padding."""
    rows = [ScoredRow(score_edits(edits), lengths[request], pads[request]) for request, edits in versions]
    width = max(length + pad for length, pad in zip(lengths, pads, strict=True))
    residual = [activation_edits(edits) for _, edits in versions]
    plan = compile_plan(residual, [lengths[request] for request, _ in versions], stream_dtype(layout))
    return Versions(
        tuple(request for request, _ in versions),
        compile_scores(rows, width, head_count(layout), torch.device("cpu")),
        plan,
        tuple(pads[request] for request, _ in versions),
        any(pads),
    )


class TensorCache:
    """A cache of small integer tensors on devices. Passes reuse the same ones, and copying each time would be slow."""

    def __init__(self) -> None:
        self._kept: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def __call__(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        if (numbers, device) not in self._kept:
            clear_if_full(self._kept)
            self._kept[numbers, device] = torch.tensor(numbers, device=device)
        return self._kept[numbers, device]


class Rows:
    """Passes of rows through a model, within `open`. Outside of the passes the model is unchanged."""

    together = 1_000
    shares = True  # whether the rows of a request share its cache

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        check_attention(layout)
        self.model = model
        self.layout = layout
        self._configs = configurations(layout)
        self._run: _Run | None = None
        self._name = ""
        self._attention_name = compat.attention_name(layout.decoder.config)
        self._owner: int | None = None
        self._versions: Versions | None = None
        self._hooked: tuple[Site, ...] = ()
        self._hooks: Hooks | None = None  # at these sites
        self.tensor = TensorCache()

    @contextmanager
    def open(self, sites: Sequence[Site]) -> Iterator[None]:
        """Attach hooks at the edited sites, and register our attention with transformers."""
        self._owner = get_ident()
        if self._hooks is None or self._hooked != tuple(sites):
            self._hooked = tuple(sites)
            self._hooks = Hooks(
                [partial(attach, place(self.layout, site), partial(self._edit, site)) for site in sites]
            )
        with registered_attention(self._attend, self._mask) as self._name, self._hooks.open():
            try:
                yield
            finally:
                self._run = None

    def run(
        self,
        token: NewestTokens,
        cache: Any,
        columns: int,
        versions: Versions,
        chosen: Sequence[int | None],
        requests: Sequence[int],
        *,
        raw_enters_cache: bool = False,
        joining: Sequence[int] = (),
        drafts: Drafts | None = None,
        holding: Sequence[ActiveMeanings] = (),
    ) -> Tensor:
        """The logits `[rows, vocabulary]` of the newest token under these versions (`None`: unsteered).

        Args:
            token: The newest token of each request.
            cache: The unsteered cache, with full keys and values also for sliding windows.
            columns: The number of the cache's columns, including this token.
            versions: The compiled versions.
            chosen: The version of each row.
            requests: The request of each row; the rows of a request are adjacent.
            raw_enters_cache: The unsteered rows, one for each request in order, append their keys and values to the
                cache. Otherwise the unsteered pass has done so before.
            joining: Steer one layer per row, to rank layers. All rows belong to one request, row 0 is unsteered, and
                row i + 1 isn't steered before block `joining[i]` (in ascending order): it is a copy of row 0 up to
                that block, and computed from there on. Only row 0's logits are returned.
            drafts: Draft tokens to compute; their logits come last. The unsteered pass must have entered the cache.
            holding: The meanings that hold for each request's newest token; empty for prompt tokens.
        """
        rows = tuple(chosen)
        of = tuple(requests)
        if drafts is not None:
            rows += tuple(None for _ in drafts.requests)
            of += drafts.requests
        self._versions = versions
        self._run = _Run(
            cache,
            len(rows),
            columns,
            _row_spans(of),
            self.tensor,
            of,
            token.mask.bool() if token.mask is not None and versions.padded else None,
            versions.select(rows),
            states_at(versions, rows, columns, holding),
            tuple(i for i, version in enumerate(rows) if version is None) if raw_enters_cache else None,
            drafts,
        )
        try:
            with compat.with_attention_implementation(self._configs, self._name), self._joined(joining):
                picked = self.tensor(of[:1] if joining else of, token.ids.device)
                inputs: dict[str, Any] = token.rows(picked, drafts)
                if joining and "logits_to_keep" in compat.parameters(self.model):
                    inputs["logits_to_keep"] = 1
                inputs = compat.with_cache(self.model, inputs, _RowCache(self._run))
                output = self.model(**inputs, use_cache=True, return_dict=True)
            self._check(self._run)
        finally:
            self._run = None
        return output.logits[0]

    def _check(self, run: _Run) -> None:
        """Raise `TrimtabError` unless every layer called our attention and every edited site ran."""
        if missing := sorted(set(range(len(run.cache.layers))) - run.attended):
            raise TrimtabError(
                f"the attention of layer {missing[0]} didn't run on the rows of this pass: it doesn't use the"
                " attention function that the model's configuration names, or doesn't update the cache that it was"
                " given"
            )
        wanted = set() if run.states is None or self._versions is None else set(self._versions.plan.stages)
        if unedited := sorted(wanted - run.edited):
            raise TrimtabError(f"the part of the model at {unedited[0]} didn't run in a pass that steers there")

    @contextmanager
    def _joined(self, joining: Sequence[int]) -> Iterator[None]:
        """Attach hooks that append a copy of row 0 before each of these blocks."""

        def join(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": _append_first_row(kwargs["hidden_states"])}
            return (_append_first_row(args[0]), *args[1:]), kwargs

        with ExitStack() as hooks:
            for layer in joining:
                block = self.layout.blocks[layer]
                hooks.enter_context(block.register_forward_pre_hook(join, with_kwargs=True, prepend=True))
            yield

    def _edit(self, site: Site, activations: Tensor) -> Tensor | None:
        run, versions = self._run, self._versions
        if run is None or run.states is None or versions is None or site not in versions.plan.stages:
            return None
        if get_ident() != self._owner:
            return None
        run.edited.add(site)
        return apply_edits(versions, site, run.states, activations)

    def _mask(self, *_: Any, **kwargs: Any) -> Tensor | None:
        """The columns that each row doesn't attend to, `[1, 1, rows, columns]`; `None`: it attends to all.

        Computed with the mask function that the model passes (causal or sliding window) for the newest token of each
        request and, with draft tokens, for the token after it.
        """
        run = self._run
        if run is None or get_ident() != self._owner:
            return compat.mask_function(self._attention_name)(*_, **kwargs)
        kept = {name: kwargs[name] for name in ("mask_function", "local_size", "use_vmap", "device") if name in kwargs}
        padding, queries = run.padding, 1 if run.drafts is None else 2
        if padding is not None and queries == 2:
            padding = torch.cat([padding, padding.new_ones(len(padding), 1)], dim=1)
        columns = run.columns + queries - 1
        visible = sdpa_mask(
            batch_size=1 if padding is None else len(padding), q_length=queries, kv_length=columns,
            q_offset=run.columns - 1, kv_offset=0, attention_mask=padding,
            allow_is_causal_skip=padding is None, **kept,
        )  # fmt: skip
        if visible is None and run.drafts is None:
            return None
        if visible is None:
            unseen = torch.zeros(run.rows, columns, dtype=torch.bool, device=kwargs.get("device"))
        else:
            requests = run.requests if len(visible) > 1 else (0,) * run.rows
            rows = self.tensor(requests, visible.device)
            unseen = ~(
                visible[rows, 0, 0] if queries == 1 else visible[rows, 0, self.tensor(run.ahead, visible.device)]
            )
        if run.drafts is not None:  # only drafts attend to the newest column: the other rows use their own key
            unseen[: run.rows - len(run.drafts.ids), -2] = True
        else:
            unseen[:, -1] = False  # `_attend` leaves out this column
        return unseen[None, None]

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The attention output `[1, rows, heads, size]` for queries `[1, heads, rows, size]`, keys and values."""
        run = self._run
        if get_ident() != self._owner:
            return compat.attention_function(self._attention_name, module)(
                module, query, key, value, attention_mask, **kwargs
            )
        mask = attention_mask
        refuse_unknown(module, kwargs)
        if run is None or run.layer is None or run.past is None:
            raise UnsupportedError(f"{type(module).__name__} attends to keys that another layer cached")
        past_keys, past_values = run.past
        if past_keys.shape[1::2] != key.shape[1::2] or past_values.shape[1::2] != value.shape[1::2]:
            raise UnsupportedError(f"{type(module).__name__} attends to keys other than those that it caches")
        if run.drafts is None:  # only drafts attend to the newest column: the other rows use their own key
            past_keys, past_values = past_keys[:, :, :-1], past_values[:, :, :-1]
        own = 1 if run.drafts is None else 2
        steered = run.scores.get(run.layer)
        steered = None if steered is None else steered.to(query.device)
        run.attended.add(run.layer)
        run.layer = run.past = None
        heads, rows, size = query.shape[1:]
        if steered is not None and rows < run.rows:
            steered = steered.select(torch.arange(rows, device=query.device))
        groups, length = past_keys.shape[1:3]
        wide = torch.promote_types(query.dtype, torch.float32)
        scaling = kwargs.get("scaling")
        scaling = size**-0.5 if scaling is None else scaling
        spans = run.spans if rows == run.rows else [(run.spans[0][0], slice(0, rows))]  # joining: one request

        past = queries_by_keys(query[0], past_keys, spans)
        alone = (query[0].view(groups, -1, rows, size) * key[0][:, None]).sum(-1, keepdim=True).view(heads, rows, 1)
        scores = torch.cat([past, alone], -1).to(wide).mul_(scaling)
        by_row = scores.transpose(0, 1).unsqueeze(2)  # [rows, heads, 1, columns]
        if steered is not None:
            steered.scale(by_row, 0, own)
        softcap = kwargs.get("softcap")
        if softcap is not None:
            scores.copy_(capped(scores, softcap))
        if mask is not None:
            scores[..., :-1].masked_fill_(mask[0, 0, :rows, :length], -torch.inf)
        scores, sinks = with_sinks(scores[None], kwargs)
        scores = scores[0]
        if steered is not None:
            steered.shift(scores.transpose(0, 1).unsqueeze(2), 0, own + sinks)
        weights = scores.softmax(-1)[..., : length + 1].to(value.dtype)

        output = (weights[..., -1:].reshape(groups, -1, rows, 1) * value[0][:, None]).view(heads, rows, -1)
        output += weights_by_values(weights[..., :-1], past_values, spans)
        return output.transpose(0, 1)[None].contiguous(), None


def cached_keys_values(cache: Any, layer: int, columns: int) -> tuple[Tensor, Tensor]:
    """A layer's keys and values `[requests, groups, columns, size]` in the unsteered cache.

    Raises:
        TrimtabError: The cache has a different number of columns.
    """
    held = cache.layers[layer]
    window = getattr(held, "window", None)
    keys, values = (held.keys, held.values) if window is None else window()
    count = 0 if keys is None else keys.shape[2]
    if count != columns:
        raise TrimtabError(
            f"the unsteered cache has {count} columns instead of {columns}: the model didn't update the cache it was"
            " given, or a forward pass was skipped"
        )
    return keys, values


def apply_edits(versions: Versions, site: Site, states: tuple[int, ...], activations: Tensor) -> Tensor:
    """Apply the edits to a site's activations, one per row, for rows in these states."""
    x = activations.reshape(1, -1, activations.shape[-1])
    for stage, rows, active in versions.prepare(site, states[: x.shape[1]], x):
        x = apply(stage, rows, active, x)
    return x.view(activations.shape)


def _append_first_row(x: Tensor) -> Tensor:
    """Append a copy of the first row to rows `[1, rows, width]`."""
    return torch.cat([x, x[:, :1]], 1)


def states_at(
    versions: Versions, chosen: Sequence[int | None], columns: int, holding: Sequence[ActiveMeanings] = ()
) -> tuple[int, ...] | None:
    """Each row's state; `None` if no row is edited. `holding` are the meanings of each request's newest token."""
    if not versions.plan.stages:
        return None
    states = tuple(
        0
        if version is None
        else state_at(
            versions.plan.at(version, holding[versions.requests[version]] if holding else NOTHING),
            columns - 1 - versions.pads[version],
        )
        for version in chosen
    )
    return states if any(states) else None


def _select(layers: dict[int, LayerScores], chosen: Sequence[int | None]) -> dict[int, LayerScores]:
    """Each layer's score edits for rows of these versions."""
    raw = torch.tensor([version is None for version in chosen])
    picked = torch.tensor([0 if version is None else version for version in chosen])
    made: dict[int, LayerScores] = {}
    for scores in layers.values():
        if id(scores) not in made:
            selected = scores.select(picked)
            made[id(scores)] = selected.without_rows(raw) if None in chosen else selected
    return {layer: made[id(scores)] for layer, scores in layers.items()}


def clear_if_full(kept: dict[Any, Any], each: int = 1) -> None:
    """Clear the cache if it is full."""
    if len(kept) >= KEPT_PATTERNS * each:
        kept.clear()


def _row_spans(requests: Sequence[int]) -> list[tuple[int, slice]]:
    """The adjacent rows of each request, as slices."""
    spans: list[tuple[int, slice]] = []
    for row, request in enumerate(requests):
        if spans and spans[-1][0] == request:
            spans[-1] = (request, slice(spans[-1][1].start, row + 1))
        else:
            spans.append((request, slice(row, row + 1)))
    return spans
