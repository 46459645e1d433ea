"""The operator that stands in the model's graph at each site. What it does is decided anew at each step.

To the compiler it is opaque: a Python hook, in contrast, would be traced once, and be frozen as it was then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trimtab.engines.vllm.rig import Rig

RIGS: list[Rig] = []
"""This process's engines' rigs; the operator gets a rig's number."""

_library = torch.library.Library("trimtab", "FRAGMENT")


def _steer(hidden: Tensor, residual: Tensor | None, place: Tensor) -> None:
    index, number = divmod(int(place), SITES)
    rig = RIGS[index]
    rig.apply(rig.numbered[number], hidden, residual)


def _steer_fake(hidden: Tensor, residual: Tensor | None, place: Tensor) -> None:
    return None


SITES = 1 << 16
"""More than any model has."""


def place_of(rig: int, number: int) -> Tensor:
    """What tells the operator at which site of which rig it stands.

    It is a tensor, on the CPU, and so an input of the graph and no constant in it: alike blocks are compiled once.
    """
    return torch.tensor(rig * SITES + number)


def define() -> None:
    """Make `torch.ops.trimtab.steer(hidden, residual, place)` known, once a process.

    `hidden` and `residual` are `[tokens, width]`; the activation is their sum, and `hidden` takes the edit.
    """
    if hasattr(torch.ops.trimtab, "steer"):
        return
    _library.define("steer(Tensor(a!) hidden, Tensor? residual, Tensor place) -> ()")
    _library.impl("steer", _steer, "CompositeExplicitAutograd")
    torch.library.register_fake("trimtab::steer", _steer_fake, lib=_library)
