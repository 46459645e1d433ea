"""The operator that stands in the model's graph after each block. What it does is decided anew at each step.

To the compiler it is opaque: a Python hook, in contrast, would be traced once, and be frozen as it was then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trimtab.engines.vllm.rig import Rig

RIGS: list[Rig] = []
"""This process's engines' rigs; the operator names one by its number, which is part of the graph."""

_library = torch.library.Library("trimtab", "FRAGMENT")


def _steer(hidden: Tensor, residual: Tensor | None, rig: int, layer: int) -> None:
    RIGS[rig].apply(layer, hidden, residual)


def _steer_fake(hidden: Tensor, residual: Tensor | None, rig: int, layer: int) -> None:
    return None


def define() -> None:
    """Make `torch.ops.trimtab.steer(hidden, residual, rig, layer)` known, once a process.

    `hidden` and `residual` are `[tokens, width]`; the residual stream is their sum, and `hidden` takes the edit.
    """
    if hasattr(torch.ops.trimtab, "steer"):
        return
    _library.define("steer(Tensor(a!) hidden, Tensor? residual, int rig, int layer) -> ()")
    _library.impl("steer", _steer, "CompositeExplicitAutograd")
    torch.library.register_fake("trimtab::steer", _steer_fake, lib=_library)
