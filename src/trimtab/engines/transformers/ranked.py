"""Which layers of a model matter most to a request: the pass in which each is steered alone (DIRECTER, 2603.06745,
section 3; the formula is in `decoding/ranking.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.decoding.ranking import disturbance, order_of, sensitivity
from trimtab.engines.transformers.attention import attention_modules
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.raw_cache import RawCache
from trimtab.engines.transformers.rows import Rows, Token, compile_versions
from trimtab.steering import Edit


def rank_layers(
    rows: Rows,
    layout: Layout,
    token: Token,
    cache: RawCache,
    columns: int,
    request: int,
    edits: tuple[Edit, ...],
    lengths: list[int],
    pads: list[int],
    ranking: str,
) -> tuple[int, ...]:
    """The order of the layers of one request's edits, best first, from one pass with a row for each of them.

    `lengths` and `pads` are those of the batch's prompts, `columns` counts the cache's with the last prompt token. A
    row joins at its layer, so the pass costs about half of what so many rows cost.
    """
    layers = sorted({edit.site.layer for edit in edits})
    if len(layers) == 1:
        return tuple(layers)
    alone = [(request, tuple(edit for edit in edits if edit.site.layer == layer)) for layer in layers]
    steer = compile_versions(layout, alone, lengths, pads)
    found: list[tuple[Tensor, Tensor]] = []
    before: list[Tensor] = []
    handles: list[Any] = []

    def enter(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        before.append(given[0])

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        after = output if isinstance(output, Tensor) else output[0]
        found.append(disturbance(before.pop(), after[0]))

    try:
        for module in attention_modules(layout):
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        chosen = [None, *range(len(layers))]
        rows.run(token, cache, columns, steer, chosen, [request] * len(chosen), joining=layers)
    finally:
        for handle in handles:
            handle.remove()
    waiting = [raw.expand(len(layers) - len(column)) for column, raw in found]  # rows that are still row 0
    crossed = torch.stack(
        [torch.cat([column, 2 * rest]).cpu() for (column, _), rest in zip(found, waiting, strict=True)], dim=1
    )
    if ranking == "repo":
        scores = sensitivity(crossed, torch.empty(0), ranking)[layers]
    else:
        scores = sensitivity(crossed, torch.stack([raw.cpu() for _, raw in found]), ranking)
    return order_of(scores, layers)
