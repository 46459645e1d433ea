"""The operator in the model's graph at each site. Its effect is determined in each step.

It is opaque to the compiler. A Python hook, in contrast, would be traced once and never change afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trimtab.engines.vllm.steering_manager import SteeringManager

MANAGERS: list[SteeringManager] = []
"""The managers of the engines in this process; the operator receives a manager's index."""

_library = torch.library.Library("trimtab", "FRAGMENT")


def _steer(hidden: Tensor, residual: Tensor | None, place: Tensor) -> None:
    index, number = divmod(int(place), SITES)
    manager = MANAGERS[index]
    manager.apply(manager.numbered[number], hidden, residual)


def _steer_fake(hidden: Tensor, residual: Tensor | None, place: Tensor) -> None:
    return None


SITES = 1 << 16
"""More sites than any model has."""


def place_of(manager: int, number: int) -> Tensor:
    """The location of an operator, that is, its manager and site, as a tensor on the CPU.

    Since it is a tensor, it is an input of the graph and not a constant, so identical blocks are compiled once.
    """
    return torch.tensor(manager * SITES + number)


def define() -> None:
    """Define `torch.ops.trimtab.steer(hidden, residual, place)`, once per process.

    `hidden` and `residual` are `[tokens, width]`; the activation is their sum, and `hidden` is edited in place.
    """
    if hasattr(torch.ops.trimtab, "steer"):
        return
    _library.define("steer(Tensor(a!) hidden, Tensor? residual, Tensor place) -> ()")
    _library.impl("steer", _steer, "CompositeExplicitAutograd")
    torch.library.register_fake("trimtab::steer", _steer_fake, lib=_library)
