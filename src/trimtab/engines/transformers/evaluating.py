"""A model in evaluation mode for as long as it is read or answers, and then in the mode that it had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module, *, every_part: bool = False) -> Iterator[None]:
    """While open, no part of the model drops activations out; afterwards each part is in the mode it was in.

    A model that is in evaluation mode as a whole is taken to be so in its parts, unless `every_part` is looked at.
    """
    if not model.training and not every_part:  # as loaded, and all that is looked at in each step
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
