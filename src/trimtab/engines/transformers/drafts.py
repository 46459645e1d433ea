"""Draft tokens: what the token after the newest may be, computed unsteered in a pass that runs anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Drafts:
    """Draft tokens: `ids[i]` in request `requests[i]`, for the batch's row `rows[i]`; those of a row side by side.

    A pass that is given them computes them over the unsteered cache, and leaves their keys and values here. Those that
    come true can then `enter` the cache, which is what a pass of their own would have done.
    """

    requests: tuple[int, ...]
    ids: tuple[int, ...]
    rows: tuple[int, ...]
    states: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def enter(self, cache: Any, rows: Sequence[int]) -> None:
        """Put one draft for each row of the cache, in order, into it."""
        picked: dict[torch.device, Tensor] = {}
        for layer, (keys, values) in self.states.items():
            if keys.device not in picked:
                picked[keys.device] = torch.tensor(rows, device=keys.device)
            cache.update(*entries(keys, values, picked[keys.device]), layer)


def entries(keys: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of one row of each request as a cache takes them: `[requests, groups, 1, size]`."""
    picked = [x[0][:, rows].transpose(0, 1).unsqueeze(2) for x in (keys, values)]
    return picked[0], picked[1]
