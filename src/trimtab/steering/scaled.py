"""Additions whose norm depends on the activation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.operations import Directed, Kernel
from trimtab.steering.projections import Rows
from trimtab.steering.tensors import as_unit


def by_norm(x: Tensor, rows: Rows) -> Tensor:
    """`x + |x| * vector`, for `x` and `vector` of shape `[..., width]`."""
    return torch.addcmul(x, torch.linalg.vector_norm(x, dim=-1, keepdim=True), rows["vector"])


def opposed(x: Tensor, rows: Rows) -> Tensor:
    """`x + (|x| + max(0, -x.direction)) * vector`, with a unit direction."""
    against = (x * rows["direction"]).sum(-1, keepdim=True).neg_().clamp_(min=0)  # |x| max(0, cos(x, -direction))
    return torch.addcmul(x, against.add_(torch.linalg.vector_norm(x, dim=-1, keepdim=True)), rows["vector"])


def by_sign(x: Tensor, rows: Rows) -> Tensor:
    """`x + sign(x.direction) * vector`."""
    return torch.addcmul(x, (x * rows["direction"]).sum(-1, keepdim=True).sign_(), rows["vector"])


KERNELS: dict[str, Kernel] = {"norm": by_norm, "opposed": opposed, "sign": by_sign}


@dataclass(frozen=True, eq=False, repr=False)
class AddScaled(Directed, name="add_scaled"):
    """`x' = x + strength * c(x) * direction`, with a unit direction `[width]` and a factor `c` that depends on `x`.

    `by="norm"`: `c = |x|`, so that the strength is a relative norm. `"opposed"`: `c = |x| (1 + max(0,
    cos(x, -direction)))`, larger if the activation points the other way; with `keep_norm` this is ICV's update
    (2311.06668). `"sign"`: `c` is the sign of the projection, so that the existing component grows in either direction
    (2310.01405).
    """

    by: str = field(default="norm", kw_only=True)

    @property
    def kernel(self) -> Kernel:
        return KERNELS[self.by]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_unit(self.direction))
        if self.by not in KERNELS:
            raise TrimtabError(f"unknown measure {self.by!r}; known: {', '.join(KERNELS)}")

    def row(self, strength: float) -> dict[str, Tensor]:
        return {"direction": self.direction, "vector": strength * self.direction}
