"""Draft tokens: guesses of the token after the newest one, computed unsteered in a pass that runs anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Drafts:
    """Draft tokens: `ids[i]` in request `requests[i]`, for the batch's row `rows[i]`; those of one row are adjacent.

    The pass computes them over the unsteered cache and stores their keys and values in `states`. Accepted drafts then
    `enter` the cache, with the same effect as a separate pass.
    """

    requests: tuple[int, ...]
    ids: tuple[int, ...]
    rows: tuple[int, ...]
    states: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def enter(self, cache: Any, rows: Sequence[int]) -> None:
        """Append drafts to the cache: `rows` are their indices, one for each row of the cache, in order."""
        picked: dict[torch.device, Tensor] = {}
        for layer, (keys, values) in self.states.items():
            if keys.device not in picked:
                picked[keys.device] = torch.tensor(rows, device=keys.device)
            cache.update(*entries(keys, values, picked[keys.device]), layer)


def entries(keys: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of one row per request, in the shape that a cache expects: `[requests, groups, 1, size]`."""
    picked = [x[0][:, rows].transpose(0, 1).unsqueeze(2) for x in (keys, values)]
    return picked[0], picked[1]
