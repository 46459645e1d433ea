"""Operations that scale the elements of an activation, each by its own factor. No direction is added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.operations import MERGE_ROWS, NEUTRAL, Directed, Operation
from trimtab.steering.projections import Rows
from trimtab.steering.tensors import as_direction, to_float64

STATISTICS = ("any", "rms")


def scale(x: Tensor, rows: Rows) -> Tensor:
    """`x * factor`, for `x` and `factor` of shape `[..., width]`."""
    return x * rows["factor"]


def multiply_factors(rows: Sequence[Rows], _names: Sequence[object]) -> Rows:
    """The product of the factors of several rows."""
    if len(rows) == 1:
        return rows[0]
    return {"factor": torch.stack([row["factor"].double() for row in rows]).prod(0)}


MERGE_ROWS[scale] = multiply_factors
NEUTRAL[scale] = 1.0


def set_values(x: Tensor, rows: Rows) -> Tensor:
    """`value` instead of `x`, both of shape `[..., width]`."""
    return rows["value"].expand_as(x)


@dataclass(frozen=True, eq=False, repr=False)
class ScaleElements(Directed, name="scale_elements"):
    """`x' = x + strength * direction * x`, element by element (SADI's `A + delta * A * M`).

    The direction is a mask `[width]`: 1 if an element is scaled in full, 0 if it isn't changed. Strength 1 doubles a
    masked element, and -1 sets it to 0.
    """

    kernel: ClassVar[Any] = staticmethod(scale)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_direction(self.direction, "mask"))

    def row(self, strength: float) -> dict[str, Tensor]:
        return {"factor": 1 + strength * self.direction}


@dataclass(frozen=True, eq=False, repr=False)
class MaskNeurons(Directed, name="mask_neurons"):
    """`x' = x * keep` with a mask computed from the request's own prompt (TDA): 1 for elements that were large in it.

    An element is kept if its magnitude in the prompt exceeds its threshold. Strength 1 masks fully, 0 not at all. Use
    it at generated positions: in the prompt it would edit the activations that it is computed from.

    The engine runs the prompt unsteered first, and then applies `settled` instead of this operation.

    Args:
        direction: The thresholds `[width]`, 0 or more. With 0, an element is always kept.
        statistic: The magnitude of an element: its largest absolute value over the prompt's tokens (`"any"`), or its
            root mean square (`"rms"`).
        skip_first: Ignore the first token of a prompt with more than one, since its activations have a different scale
            in most models.
    """

    statistic: str = field(default="any", kw_only=True)
    skip_first: bool = field(default=True, kw_only=True)

    kernel: ClassVar[Any] = staticmethod(scale)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_direction(self.direction, "vector of thresholds"))
        if self.statistic not in STATISTICS:
            raise TrimtabError(f"unknown statistic {self.statistic!r}; known: {', '.join(STATISTICS)}")
        if not isinstance(self.skip_first, bool):
            raise TrimtabError(f"skip_first is true or false, got {self.skip_first!r}")
        if bool((self.direction < 0).any()):
            raise TrimtabError("a neuron's threshold is a magnitude, 0 or more")

    def kept(self, prompt: Tensor) -> Tensor:
        """The elements that are kept, for a prompt with these activations `[tokens, width]`: booleans `[width]`."""
        sizes = to_float64(prompt[1 if self.skip_first and len(prompt) > 1 else 0 :]).abs()
        large = sizes.amax(0) if self.statistic == "any" else sizes.square().mean(0).sqrt()
        # with a threshold of 0, an element is kept even if all its activations are 0
        return (large > self.direction) | (self.direction == 0)

    def settled(self, prompt: Tensor) -> ScaleElements:
        """The operation for a prompt with these activations `[tokens, width]`."""
        return ScaleElements(self.kept(prompt).to(self.direction.dtype) - 1, keep_norm=self.keep_norm)

    def row(self, strength: float) -> dict[str, Tensor]:
        raise TrimtabError("a neuron mask is computed from a prompt; run it with lm.generate(…) or lm.steered(…)")


@dataclass(frozen=True, eq=False, repr=False)
class HoldElements(Directed, name="hold_elements"):
    """`x' = c + strength * direction * c`, where c is the prompt's unsteered activation at its last token.

    Like `ScaleElements`, but applied to the activation of an unsteered pass instead of x, so that earlier edits have
    no effect: edits at several layers don't interact (SADI's released code). The direction is a mask `[width]`; with
    a mask of zeros, the result is the unsteered activation. Use it at the last prompt token: at any other position
    it writes that token's activation.

    The engine runs the prompt unsteered first, and then applies `settled` instead of this operation.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_direction(self.direction, "mask"))

    def settled(self, prompt: Tensor) -> Operation:
        """The operation for a prompt with these activations `[tokens, width]`."""
        return ResolvedHoldElements(self.direction, to_float64(prompt[-1]), keep_norm=self.keep_norm)

    def row(self, strength: float) -> dict[str, Tensor]:
        raise TrimtabError("the values to hold are computed from a prompt; run it with lm.generate(…) or lm.steered(…)")


@dataclass(frozen=True, eq=False, repr=False)
class ResolvedHoldElements(Directed):
    """`HoldElements` for one prompt: it scales `value` `[width]`. Never written by hand or saved."""

    value: Tensor

    kernel: ClassVar[Any] = staticmethod(set_values)

    def row(self, strength: float) -> dict[str, Tensor]:
        return {"value": self.value * (1 + strength * self.direction.double())}
