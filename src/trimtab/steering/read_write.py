"""The general low-rank edit: an activation's components along some directions determine what is added along others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import inf, isnan
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.low_rank import LowRank
from trimtab.steering.operations import Operation
from trimtab.steering.projections import Rows
from trimtab.steering.tensors import as_direction, as_matrix


def read_write(x: Tensor, rows: Rows) -> Tensor:
    """`x + strength * f(A x + c) B` with each token's own map, for `x` `[..., width]`."""
    return rows["map"].edit(x, rows["strength"])


@dataclass(frozen=True, eq=False, repr=False)
class ReadWrite(Operation, name="read_write"):
    """`x' = x + strength * sum over i of clamp(read_i . x + bias_i, low_i, high_i) write_i`, of any rank.

    In matrix form `x' = x + strength * f(x Aᵀ + c) B`: each row reads a coefficient from the activation, and adds its
    `write` vector times that coefficient. Most operations are special cases (docs/operations.md has their formulas); a
    row with a zero `read` and a bias of 1 adds its `write` to every activation. Rank 0 changes nothing.

    Args:
        read: A, `[rank, width]`.
        write: B, `[rank, width]`: row i belongs to row i of `read`.
        bias: c, `[rank]`, one number for all rows, or `None` for 0.
        low: The lower bound of each coefficient, `[rank]` or one number for all; `None` or minus infinity: no bound.
            With 0, `f` is a ReLU.
        high: The upper bound, likewise; `None` or infinity: no bound.

    Raises:
        TrimtabError: Shapes don't match, values are NaN or infinite (except for a bound of `-inf` in `low` or `inf`
            in `high`), or a lower bound is above the upper one.
    """

    read: Tensor
    write: Tensor
    bias: Tensor | None = None
    low: Tensor | float | None = None
    high: Tensor | float | None = None

    kernel: ClassVar[Any] = staticmethod(read_write)

    def __post_init__(self) -> None:
        super().__post_init__()
        read, write = as_matrix(self.read, "read"), as_matrix(self.write, "write")
        if read.shape != write.shape:
            raise TrimtabError(
                f"read and write have one shape, [rank, width], got {list(read.shape)} and {list(write.shape)}; row i"
                " of write is what row i of read writes (a matrix [width, rank] has to be transposed)"
            )
        low, high = (_bound(value, read, name, side) for name, value, side in self._bounds)
        if low is not None and high is not None and bool((low > high).any()):
            row = int((low > high).nonzero()[0])
            raise TrimtabError(f"low is above high in row {row}: {float(low[row]):g} > {float(high[row]):g}")
        made = {"read": read, "write": write, "bias": _bias(self.bias, read), "low": low, "high": high}
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @property
    def _bounds(self) -> tuple[tuple[str, Any, float], ...]:
        return ("low", self.low, -inf), ("high", self.high, inf)

    @property
    def rank(self) -> int:
        return self.read.shape[0]

    @property
    def width(self) -> int:
        return self.read.shape[1]

    @property
    def norm(self) -> float:
        return float(self.write.double().norm())

    @cached_property
    def map(self) -> LowRank:
        """The operation's matrices, with one cached copy per device."""
        return LowRank(*(getattr(self, name) for name in ("read", "bias", "write", "low", "high")))

    def row(self, strength: float) -> Rows:
        return {"strength": torch.full((1,), strength, dtype=torch.float64), "map": self.map}


def _bias(value: Any, read: Tensor) -> Tensor:
    rank = len(read)
    if value is None:
        return read.new_zeros(rank)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = read.new_full((rank,), value)
    bias = as_direction(value, "bias")
    if len(bias) != rank:
        raise TrimtabError(f"a bias has one number per row of read ({rank} rows), got {len(bias)}")
    return bias


def _bound(value: Any, read: Tensor, name: str, nothing: float) -> Tensor | None:
    """The bounds `[rank]`, checked; `None` if no row is bounded."""
    rank = len(read)
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isnan(value):
            raise TrimtabError(f"{name} is one number per row, or one for all rows, got NaN")
        value = read.new_full((rank,), value)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 1 or len(value) != rank:
        what = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TrimtabError(f"{name} is one number, or a floating-point tensor of shape [{rank}] (the rank), got {what}")
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    bound = value.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
    if bool((bound.isnan() | (bound == -nothing)).any()):
        raise TrimtabError(
            f"{name} contains a bound that no value can satisfy: NaN, or {-nothing:g}; use {nothing:g} for no bound"
        )
    return None if bool((bound == nothing).all()) else bound
