"""Rank a request's layers by sensitivity, in a pass that steers each layer alone (DIRECTER, 2603.06745, section 3; the
formula is in `decoding/ranking.py`)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.decoding.ranking import disturbance, order_layers, sensitivity
from trimtab.engines.transformers.attention import attention_modules
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.rows import Versions, compile_versions
from trimtab.errors import UnsupportedError
from trimtab.steering import Edit


def rank_layers(
    rows: Any,
    layout: Layout,
    token: Any,
    cache: Any,
    columns: int,
    request: int,
    edits: tuple[Edit, ...],
    lengths: list[int],
    pads: list[int],
    ranking: str,
) -> tuple[int, ...]:
    """The order of the layers of one request's edits, best first, from one pass with one row per layer.

    With `Rows` a row joins the pass at its layer, so the pass costs about half of that many full rows; `Forks` runs
    full rows, a few at a time. The outputs of the attention modules are observed, or those of the blocks if the model
    has no attention or if attention's input is wider than the residual stream (Zamba).

    Args:
        rows: Runs the passes: `Rows` or `Forks`.
        layout: The model's layout.
        token: The last prompt tokens.
        cache: The cache of the unsteered prompts.
        columns: The number of the cache's columns, including the last prompt token.
        request: The index of the request in the batch.
        edits: Its edits.
        lengths: The lengths of the batch's prompts.
        pads: The left padding of the batch's prompts.
        ranking: `"paper"` or `"repo"`, see `Rejection`.

    Raises:
        UnsupportedError: The layers can't be ranked in this model.
    """
    layers = sorted({edit.site.layer for edit in edits})
    if len(layers) == 1:
        return tuple(layers)
    alone = [(request, tuple(edit for edit in edits if edit.site.layer == layer)) for layer in layers]
    steer = compile_versions(layout, alone, lengths, pads)
    observed = {i: module for i, module in enumerate(attention_modules(layout)) if module is not None}
    observed = observed or dict(enumerate(layout.blocks))
    if ranking == "repo" and (without := sorted(set(layers) - observed.keys())):
        raise UnsupportedError(
            f"ranking='repo' ranks the steered layers by their attention, and layer {without[0]} has none; use 'paper'"
        )
    tables: list[list[Tensor]] = []  # per lot of rows, for each observed layer: the distances of the rows
    raws: list[Tensor] = []
    for start in range(0, len(layers), rows.together):
        lot = list(range(start, min(len(layers), start + rows.together)))
        arguments = rows, list(observed.values()), token, cache, columns, steer, request, lot, layers
        try:
            observations = _observe(*arguments)
        except _WidthMismatch:
            observed = {i: layout.blocks[i] for i in observed}
            observations = _observe(rows, list(observed.values()), *arguments[2:])
        tables.append([_all_distances(column, raw, len(lot)) for column, raw in observations])
        raws = [raw.cpu() for _, raw in observations]
    crossed = torch.stack([torch.cat(columns_of) for columns_of in zip(*tables, strict=True)], dim=1)
    if ranking == "repo":
        scores = sensitivity(crossed, torch.empty(0), ranking)[[list(observed).index(layer) for layer in layers]]
    else:
        scores = sensitivity(crossed, torch.stack(raws), ranking)
    return order_layers(scores, layers)


class _WidthMismatch(Exception):
    """The input and output of an attention module have different widths, so their cosine distance is undefined."""


def _all_distances(column: Tensor, raw: Tensor, rows: int) -> Tensor:
    """The distances of all rows at an observed layer; rows that join later are still identical to row 0 there."""
    return torch.cat([column, 2 * raw.expand(rows - len(column))]).cpu()


def _observe(
    rows: Any,
    modules: list[nn.Module],
    token: Any,
    cache: Any,
    columns: int,
    steer: Versions,
    request: int,
    lot: list[int],
    layers: list[int],
) -> list[tuple[Tensor, Tensor]]:
    """The `disturbance` at each observed module, from one pass over row 0 (unsteered) and one row per version."""
    observations: list[tuple[Tensor, Tensor]] = []
    before: list[Tensor] = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        before.append(hidden.reshape(-1, hidden.shape[-1]))

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        after = output if isinstance(output, Tensor) else output[0]
        if after.shape[-1] != before[-1].shape[-1]:
            raise _WidthMismatch
        observations.append(disturbance(before.pop(), after.reshape(-1, after.shape[-1])))

    with ExitStack() as hooks:
        for module in dict.fromkeys(modules):  # blocks may share one
            hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(leave))
        chosen = [None, *lot]
        rows.run(
            token, cache, columns, steer, chosen, [request] * len(chosen), joining=[layers[number] for number in lot]
        )
    if len(observations) != len(modules):
        raise UnsupportedError(
            f"{len(observations)} attention modules ran instead of {len(modules)}, so the layers can't be ranked; give"
            " their order as Rejection(ranking=…)"
        )
    return observations
