"""The operation on a router's logits: experts are promoted above all others, or demoted below them (SteerMoE)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.operations import Directed
from trimtab.steering.projections import Rows
from trimtab.steering.tensors import as_direction

STEP = 2.0**-7
"""A step of bfloat16 between neighbouring numbers, of their size, at most."""


def route(x: Tensor, rows: Rows) -> Tensor:
    """Logits `[..., experts]` of which those with `towards` above 0 move to the top, and those below 0 to the bottom.

    The top is the largest logit and `margin`, or one step of bfloat16 where that is more, so that rounding keeps it.
    """
    towards, margin = rows["towards"], rows["margin"]
    most, least = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    top = most + torch.maximum(margin, most.abs() * STEP)
    bottom = least - torch.maximum(margin, least.abs() * STEP)
    return torch.lerp(torch.lerp(x, top, towards.clamp(min=0)), bottom, (-towards).clamp(min=0))


@dataclass(frozen=True, eq=False, repr=False)
class RouteExperts(Directed, name="route_experts"):
    """Promote experts, `x'_e = max(x) + margin`, and demote others, `x'_e = min(x) - margin` (2509.09660, section 3.2).

    The direction is `[experts]`: 1 where an expert is promoted, -1 where it is demoted, 0 where its logit stays. It is
    for the site `Site.router(layer)`, before the router chooses. At strength 1 a logit is moved in full, at one half
    half-way; a negative strength promotes what is demoted, and demotes what is promoted. The paper moves the logarithms
    of the softmax, which differ from logits by a constant: where the router takes a softmax that is the same, and where
    it takes a sigmoid logits keep their meaning. A family's own biases and groups of experts come after it.
    """

    margin: float = field(default=0.01, kw_only=True)

    kernel: ClassVar[Any] = staticmethod(route)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_direction(self.direction, "choice of experts"))
        object.__setattr__(self, "margin", float(self.margin))
        if not bool(torch.isin(self.direction.double(), torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)).all()):
            raise TrimtabError("of experts 1 promotes one, -1 demotes one, and 0 leaves one; there is another number")
        if not 0 < self.margin < float("inf"):
            raise TrimtabError(f"the margin of promoted experts is a number above 0, got {self.margin!r}")

    @classmethod
    def of(
        cls, experts: int, promote: tuple[int, ...] = (), demote: tuple[int, ...] = (), *, margin: float = 0.01
    ) -> RouteExperts:
        """By the numbers of experts, counted from 0. Raises `TrimtabError` for one that isn't there, or is in both."""
        for number in (*promote, *demote):
            if not 0 <= number < experts:
                raise TrimtabError(f"there is no expert {number}; a router of {experts} has experts 0 to {experts - 1}")
        if both := set(promote) & set(demote):
            raise TrimtabError(f"expert {min(both)} is to be promoted and demoted")
        signs = torch.zeros(experts)
        signs[list(promote)], signs[list(demote)] = 1.0, -1.0
        return cls(signs, margin=margin)

    def row(self, strength: float) -> dict[str, Tensor]:
        ones = self.direction.new_ones(1)
        return {"towards": strength * self.direction, "margin": self.margin * ones}
