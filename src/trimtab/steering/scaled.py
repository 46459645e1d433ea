"""Additions whose length depends on the activation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.operations import Operation
from trimtab.steering.projections import Rows
from trimtab.steering.tensors import as_unit

MEASURES = ("norm", "opposed", "sign")


def add_scaled(x: Tensor, rows: Rows) -> Tensor:
    """`x + c(x) * vector`, for `x` and `vector` of shape `[..., width]`; `by_norm`, `opposed` and `sign` choose c."""
    vector = rows["vector"]
    along = (x * rows["direction"]).sum(-1, keepdim=True)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    against = (-along).clamp_min(0)  # |x| max(0, cos(x, -v))
    c = rows["by_norm"] * norm + rows["opposed"] * (norm + against) + rows["sign"] * torch.sign(along)
    return x + c * vector


@dataclass(frozen=True, eq=False, repr=False)
class AddScaled(Operation, name="add_scaled"):
    """`x' = x + strength * c(x) * direction`, with a unit direction `[width]` and a length that depends on `x`.

    `by="norm"`: `c = |x|`, so that a strength is in norms of the activation. `"opposed"`: `c = |x| (1 + max(0,
    cos(x, -direction)))`, more where the activation points the other way; with `keep_norm` it is ICV's update
    (2311.06668). `"sign"`: `c` is the sign of the projection, so that what is there grows, whichever way (2310.01405).
    """

    by: str = field(default="norm", kw_only=True)

    kernel = staticmethod(add_scaled)

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", as_unit(self.direction))
        if self.by not in MEASURES:
            raise TrimtabError(f"unknown measure {self.by!r}; known: {', '.join(MEASURES)}")

    def row(self, strength: float) -> dict[str, Tensor]:
        one = self.direction.new_ones(1)
        names = {"norm": "by_norm", "opposed": "opposed", "sign": "sign"}
        chosen = {row: one * (measure == self.by) for measure, row in names.items()}
        return {"direction": self.direction, "vector": strength * self.direction, **chosen}
