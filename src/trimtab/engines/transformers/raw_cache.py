"""The cache of the unsteered stream, and guesses of the token that enters it next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.transformers.compat import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from trimtab.errors import UnsupportedError


class RawCache(DynamicCache):
    """The cache of the unsteered stream. It remembers what each layer attended to last: `seen[layer]`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self.layers):
            raise UnsupportedError("rejection needs a cache of plain keys and values, which this model doesn't have")

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen.pop(layer_idx, None)  # not held twice
        self.seen[layer_idx] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self.seen[layer_idx]


@dataclass
class Guesses:
    """What the token after the newest may be: `ids[i]` in request `requests[i]`, the guesses of one side by side.

    A pass that is given them computes them unsteered, over the raw cache, and leaves their keys and values here. Those
    that come true can then `enter` the cache, which is what a pass of their own would have done.
    """

    requests: tuple[int, ...]
    ids: tuple[int, ...]
    states: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def true(self, tokens: Sequence[int]) -> list[int] | None:
        """For each request the row that guessed its next token; `None` where one has none."""
        rows = {(request, token): row for row, (request, token) in enumerate(zip(self.requests, self.ids, strict=True))}
        found = [rows.get(place) for place in enumerate(tokens)]
        return None if None in found else [row for row in found if row is not None]

    def enter(self, cache: RawCache, rows: Sequence[int]) -> None:
        """Put one row of each request, in order, into the cache."""
        picked: dict[torch.device, Tensor] = {}
        for layer, (keys, values) in self.states.items():
            if keys.device not in picked:
                picked[keys.device] = torch.tensor(rows, device=keys.device)
            cache.update(*entries(keys, values, picked[keys.device]), layer)


def entries(keys: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of one row of each request as a cache takes them: `[requests, groups, 1, size]`."""
    picked = [x[0][:, rows].transpose(0, 1).unsqueeze(2) for x in (keys, values)]
    return picked[0], picked[1]
