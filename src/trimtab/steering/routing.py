"""The operation on router logits: experts are promoted above all others, or demoted below them (SteerMoE)."""

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
"""The largest relative step between neighboring bfloat16 numbers."""


def route(x: Tensor, rows: Rows) -> Tensor:
    """Logits `[..., experts]` where those with `towards` above 0 move to the top, and those below 0 to the bottom.

    The top is the largest logit plus `margin`, or plus one bfloat16 step if that is larger, so that rounding doesn't
    remove the difference. The bottom is the smallest logit minus the same.
    """
    towards, margin = rows["towards"], rows["margin"]
    most, least = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    top = most + torch.maximum(margin, most.abs() * STEP)
    bottom = least - torch.maximum(margin, least.abs() * STEP)
    return torch.lerp(torch.lerp(x, top, towards.clamp(min=0)), bottom, (-towards).clamp(min=0))


@dataclass(frozen=True, eq=False, repr=False)
class RouteExperts(Directed, name="route_experts"):
    """Promote experts, `x'_e = max(x) + margin`, and demote others, `x'_e = min(x) - margin` (2509.09660, section 3.2).

    The direction is `[experts]`: 1 promotes an expert, -1 demotes it, and 0 doesn't change its logit. It acts at
    `Site.router(layer)`, before the router selects experts. Strength 1 moves a logit all the way, and 0.5 halfway. A
    negative strength swaps promotion and demotion. The paper moves the log-softmax, which differs from the logits by a
    constant: for a softmax router that is equivalent, and for a sigmoid router logits keep their meaning. Expert biases
    and expert groups, in families that have them, are applied afterwards.
    """

    margin: float = field(default=0.01, kw_only=True)

    kernel: ClassVar[Any] = staticmethod(route)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_direction(self.direction, "choice of experts"))
        object.__setattr__(self, "margin", float(self.margin))
        if not bool(torch.isin(self.direction.double(), torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)).all()):
            raise TrimtabError(
                "a choice of experts has 1 to promote, -1 to demote and 0 to leave an expert; it contains another"
                " number"
            )
        if not 0 < self.margin < float("inf"):
            raise TrimtabError(f"the margin of promoted experts is a number above 0, got {self.margin!r}")

    @classmethod
    def of(
        cls, experts: int, promote: tuple[int, ...] = (), demote: tuple[int, ...] = (), *, margin: float = 0.01
    ) -> RouteExperts:
        """Promote and demote experts by index, from 0. Raises `TrimtabError` for one out of range or in both lists."""
        for number in (*promote, *demote):
            if not 0 <= number < experts:
                raise TrimtabError(f"there is no expert {number}; a router of {experts} has experts 0 to {experts - 1}")
        if both := set(promote) & set(demote):
            raise TrimtabError(f"expert {min(both)} is both promoted and demoted")
        signs = torch.zeros(experts)
        signs[list(promote)], signs[list(demote)] = 1.0, -1.0
        return cls(signs, margin=margin)

    def row(self, strength: float) -> dict[str, Tensor]:
        ones = self.direction.new_ones(1)
        return {"towards": strength * self.direction, "margin": self.margin * ones}
