"""Operations on an activation's own elements: each is scaled by a number of its own; no direction is added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.operations import NEUTRAL, TOGETHER, Directed, Operation
from trimtab.steering.projections import Rows
from trimtab.steering.tensors import as_direction, to_float64

STATISTICS = ("any", "rms")


def scale(x: Tensor, rows: Rows) -> Tensor:
    """`x * factor`, for `x` and `factor` of shape `[..., width]`."""
    return x * rows["factor"]


def multiply_up(rows: Sequence[Rows], _names: Sequence[object]) -> Rows:
    """The factors of several rows as one."""
    if len(rows) == 1:
        return rows[0]
    return {"factor": torch.stack([row["factor"].double() for row in rows]).prod(0)}


TOGETHER[scale] = multiply_up
NEUTRAL[scale] = 1.0


def put(x: Tensor, rows: Rows) -> Tensor:
    """`value` in place of `x`, both of shape `[..., width]`."""
    return rows["value"].expand_as(x)


@dataclass(frozen=True, eq=False, repr=False)
class ScaleElements(Directed, name="scale_elements"):
    """`x' = x + strength * direction * x`, element by element (SADI's `A + delta * A * M`).

    The direction is a mask `[width]`: 1 where an element is scaled in full, 0 where it stays. At strength 1 an
    element under the mask is doubled, at -1 it is 0.
    """

    kernel: ClassVar[Any] = staticmethod(scale)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_direction(self.direction, "mask"))

    def row(self, strength: float) -> dict[str, Tensor]:
        return {"factor": 1 + strength * self.direction}


@dataclass(frozen=True, eq=False, repr=False)
class MaskNeurons(Directed, name="mask_neurons"):
    """`x' = x * keep` with a mask that the request's own prompt decides (TDA): 1 where an element was large in it.

    The direction holds thresholds `[width]`. An element is kept if its size over the prompt's tokens exceeds its
    threshold: at one of them (`statistic="any"`), or its root mean square (`"rms"`). With `skip_first`, the first
    token of a longer prompt doesn't count: its activations are of another size in most models. Strength 1 masks in
    full, 0 not at all. At positions of the prompt it would act on what it is decided from; it is for generated ones.

    The engine reads the prompt, unsteered, before the run, and runs `settled` in its place.
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
            raise TrimtabError("a neuron's threshold is a size, 0 or more")

    def kept(self, prompt: Tensor) -> Tensor:
        """Which elements are kept after a prompt with these activations `[tokens, width]`: booleans `[width]`."""
        sizes = to_float64(prompt[1 if self.skip_first and len(prompt) > 1 else 0 :]).abs()
        large = sizes.amax(0) if self.statistic == "any" else sizes.square().mean(0).sqrt()
        # nothing exceeds 0 but what isn't 0: at threshold 0 all is kept
        return (large > self.direction) | (self.direction == 0)

    def settled(self, prompt: Tensor) -> ScaleElements:
        """The operation for a prompt with these activations `[tokens, width]`."""
        return ScaleElements(self.kept(prompt).to(self.direction.dtype) - 1, keep_norm=self.keep_norm)

    def row(self, strength: float) -> dict[str, Tensor]:
        raise TrimtabError("a mask of neurons is decided by a prompt; run it with lm.generate(…) or lm.steered(…)")


@dataclass(frozen=True, eq=False, repr=False)
class HoldElements(Directed, name="hold_elements"):
    """`x' = c + strength * direction * c` with c the prompt's own, unsteered activation at its last token.

    As `ScaleElements`, but of what a clean pass had there, whatever earlier edits have made of x since: layers held
    like this don't react to each other (SADI's released code). The direction is a mask `[width]`; with a mask of zeros
    the clean activation stays. It is meant for the last prompt token; elsewhere it puts that token's activation.

    The engine reads the prompt, unsteered, before the run, and runs `settled` in its place.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_direction(self.direction, "mask"))

    def settled(self, prompt: Tensor) -> Operation:
        """The operation for a prompt with these activations `[tokens, width]`."""
        return Held(self.direction, to_float64(prompt[-1]), keep_norm=self.keep_norm)

    def row(self, strength: float) -> dict[str, Tensor]:
        raise TrimtabError("what is held is decided by a prompt; run it with lm.generate(…) or lm.steered(…)")


@dataclass(frozen=True, eq=False, repr=False)
class Held(Directed):
    """What `HoldElements` comes to for one prompt, whose `value` `[width]` it scales; it isn't written or saved."""

    value: Tensor

    kernel: ClassVar[Any] = staticmethod(put)

    def row(self, strength: float) -> dict[str, Tensor]:
        return {"value": self.value * (1 + strength * self.direction.double())}
