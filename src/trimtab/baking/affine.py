"""The edits at a site as an affine map of activations that weights can represent: `x' = A x + c`.

`Ablate` is linear and `Add` a constant, so any sequence of them is such a map. The kernels that steer also compute it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.engines.folding import kernel_call, slots_at
from trimtab.steering import Edit
from trimtab.steering.operations import Kernel, Rows, add

ORTHOGONAL_TOLERANCE = 1e-6
"""A component along a direction counts as zero below this share of the norm; directions are stored in float32."""
CHUNK = 1 << 22
"""The number of elements that are converted to float64 at a time."""


@dataclass(frozen=True)
class Affine:
    """The steps of one site in order, each a kernel with its rows in float64."""

    width: int
    steps: tuple[tuple[Kernel, Rows], ...] = ()

    @classmethod
    def of(cls, edits: Sequence[Edit], width: int) -> Affine:
        """The map of the additions and ablations of one site, in the order in which they act."""
        steps = []
        for slot in slots_at(tuple(edits), edits[0].site) if edits else []:
            kernel, row = kernel_call(slot)
            steps.append((kernel, {name: value.double() for name, value in row.items()}))
        return cls(width, tuple(steps))

    def then_add(self, vector: Tensor) -> Affine:
        """The same map with `vector` `[width]` added at the end."""
        return Affine(self.width, (*self.steps, (add, {"vector": vector.double()})))

    def apply_linear(self, x: Tensor) -> Tensor:
        """`A x` for each row of `x` `[rows, width]`, computed in float64 and rounded once to the dtype of `x`."""
        new = torch.empty_like(x)
        for start in range(0, len(x), size := max(1, CHUNK // self.width)):
            part = x[start : start + size].double()
            for kernel, rows in self.steps:
                part = part if kernel is add else kernel(part, rows)
            new[start : start + size] = part.to(x.dtype)
        return new

    def apply(self, x: Tensor) -> Tensor:
        """`A x + c` for `x` `[..., width]`, in float64."""
        x = x.double()
        for kernel, rows in self.steps:
            x = kernel(x, rows)
        return x

    @property
    def offset(self) -> Tensor:
        """`c`, `[width]`: the output for an input of zeros."""
        return self.apply(torch.zeros(self.width, dtype=torch.float64))

    @property
    def adds(self) -> bool:
        """Whether `c` isn't zero."""
        return bool(self.offset.any())

    @property
    def ablates(self) -> bool:
        """Whether `A` isn't the identity."""
        return any(kernel is not add for kernel, _ in self.steps)

    def output_is_orthogonal(self, direction: Tensor) -> bool:
        """Whether the output never has a component along this unit direction `[width]`."""
        x = torch.randn(8, self.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return is_orthogonal(self.apply(x), direction)


def is_orthogonal(x: Tensor, direction: Tensor) -> bool:
    """Whether `x` `[..., width]` has (almost) no component along the unit direction `[width]`."""
    along = (x.double() @ direction.double()).abs()
    return bool((along <= ORTHOGONAL_TOLERANCE * x.double().norm(dim=-1)).all())
