"""A forward pass of a session: the states of its tokens, the prepared edits of its sites, and norms of activations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.engines.folding import Prepared, States
from trimtab.steering import Site

Steady = tuple[torch.Size, Prepared]
"""Prepared edits that are applied in place to activations of this shape, the same at each decoded token."""


@dataclass
class SteeredPass:
    """One forward pass, from the first steered column on.

    Prepared edits are kept for passes of one token, which repeat. For a prompt they would take as much memory as a
    batch of activations per site.
    """

    states: tuple[tuple[int, ...], ...]  # one tuple per row, all columns
    first: int
    tokens: States  # from column `first` on: [rows, tokens]
    present: frozenset[int]
    prepared: dict[Site, Prepared] = field(default_factory=dict)
    # in passes of one token, for sites that only add: the vectors to add, and the buffer for the activations' norms
    adds: dict[Site, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # likewise, for sites that only scale: the factors, and the buffers for the norms of activations and edits
    scales: dict[Site, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    # for each hook, the edits in a pass of one token whose dose isn't measured; `None` if not known yet
    steady: list[Steady | None] = field(default_factory=list)
    steered: Tensor | None = None  # [sites, rows, tokens]: whether the site edits the token
    passes: int = 0  # the number of consecutive passes with these states

    @property
    def index(self) -> Tensor:
        """The states `[rows, tokens]` on the device."""
        return self.tokens.index


def norm(x: Tensor) -> Tensor:
    """The norm of each activation, in float32 at least."""
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def norm_into(out: Tensor, x: Tensor) -> None:
    """Write the norms of activations to `out`, which may be on another device."""
    if out.device == x.device:
        torch.linalg.vector_norm(x, dim=-1, dtype=out.dtype, out=out)
    else:
        out.copy_(norm(x))
