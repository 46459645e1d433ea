"""A context that puts a model into evaluation mode and then restores its previous mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module, *, every_part: bool = False) -> Iterator[None]:
    """Put all modules into evaluation mode, so that there is no dropout; each one's mode is restored afterwards.

    If the model itself is in evaluation mode, its submodules are assumed to be, too, unless `every_part` is set.
    """
    if not model.training and not every_part:  # the usual case, and a cheap check for every step
        yield
        return
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
