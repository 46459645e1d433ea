"""A forward pass of a session: the states of its tokens, what its sites have prepared, and norms of activations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.engines.folding import Prepared, States
from trimtab.steering import Site

Steady = tuple[torch.Size, Prepared]
"""What is done in place to activations of this shape, at each token alike."""


@dataclass
class SteeredPass:
    """One forward pass, from the first column on in which anything is steered.

    What sites prepare is kept for passes of one token, which repeat; for a prompt it would hold a batch of
    activations a site.
    """

    states: tuple[tuple[int, ...], ...]  # one tuple a row, all columns
    first: int
    tokens: States  # from column `first` on: [rows, tokens]
    present: frozenset[int]
    prepared: dict[Site, Prepared] = field(default_factory=dict)
    # sites that only add, in a pass of one token: the rows to add, and where the activations' norms go
    adds: dict[Site, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # sites that only scale, likewise: the factors, and where the norms of activations and edits go
    scales: dict[Site, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    # by hook, what is done in a pass of one token that isn't measured; `None` where that isn't known yet
    steady: list[Steady | None] = field(default_factory=list)
    steered: Tensor | None = None  # [sites, rows, tokens], what `present` says token by token
    passes: int = 0  # how many passes in a row had these states

    @property
    def index(self) -> Tensor:
        """The states' numbers on the device."""
        return self.tokens.index


def norm(x: Tensor) -> Tensor:
    """The norm of each activation, in float32 at least."""
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def norm_into(out: Tensor, x: Tensor) -> None:
    """Put the norms of activations there, which may be on another device."""
    if out.device == x.device:
        torch.linalg.vector_norm(x, dim=-1, dtype=out.dtype, out=out)
    else:
        out.copy_(norm(x))
