"""Operations: the change that an edit makes to an activation. Each is a case of `x' = a * x + b * v`.

An operation is plain data. An engine uses only two things of it: `row(strength)`, its parameters as a few small
vectors, and `kernel`, a function of a batch of activations and the batch of those rows. Requests whose operations
share a kernel run in one call, and a new operation is a new pair of the two. If consecutive operations with the same
kernel act jointly rather than in sequence, `MERGE_ROWS` has the function that merges their rows. Parameters that are
too large to copy for every token are a `LowRank` in a row; the tokens of one `LowRank` are multiplied together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from math import inf, isfinite, nan
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.keywords import check_fields
from trimtab.steering.projections import Rows, set_projections, solve_projections
from trimtab.steering.tensors import as_direction, as_share, as_unit, tensors_equal

Kernel = Callable[..., Tensor]
MergeRows = Callable[[Sequence[Rows], Sequence[object]], Rows]


def add(x: Tensor, rows: Rows) -> Tensor:
    """`x + vector`, for `x` and `vector` of shape `[..., width]`."""
    return x + rows["vector"]


def sum_vectors(rows: Sequence[Rows], _names: Sequence[object]) -> Rows:
    """The sum of the vectors of several rows."""
    if len(rows) == 1:
        return rows[0]
    return {"vector": torch.stack([row["vector"].double() for row in rows]).sum(0)}


SHORTEST = 1e-30
"""An activation with a smaller norm counts as zero, without a direction."""


def with_norm_of(x: Tensor, y: Tensor, share: float = 1.0, out: Tensor | None = None) -> Tensor:
    """`y` rescaled to the norm of `x`, or by this share of the way; both `[..., width]`. A zero `y` stays zero."""
    target_norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if share == 1 and y.is_cuda and FUSED:
        return torch.mul(unit(y), target_norm, out=out)
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    if share != 1:
        target_norm = torch.lerp(norm, target_norm, share)
    return torch.mul(y, target_norm / norm.clamp_min(SHORTEST), out=out)


FUSED = hasattr(torch.ops.aten, "_fused_rms_norm")
"""Whether this torch has RMS normalization as a single CUDA kernel (since 2.9)."""


def unit(y: Tensor) -> Tensor:
    """`y` `[..., width]` normalized to norm 1, in one kernel; zeros stay zeros."""
    weight = _unit_norm_weight(y.shape[-1], y.dtype, y.device)
    return torch.nn.functional.rms_norm(y, y.shape[-1:], weight, float(torch.finfo(y.dtype).tiny))


@lru_cache(maxsize=64)
def _unit_norm_weight(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The RMS normalization weight that gives a norm of 1. Cached, since creating it costs a kernel launch."""
    with torch.inference_mode(False):
        return torch.full((width,), width**-0.5, dtype=dtype, device=device)


OPERATIONS: dict[str, type[Operation]] = {}
NAMES: dict[type[Operation], str] = {}


@dataclass(frozen=True, eq=False)
class Operation:
    """The base class of all operations on activations.

    `keep_norm` is a share from 0 (`False`) to 1 (`True`): each edited activation is rescaled to the norm
    `(1 - keep_norm) * |new| + keep_norm * |old|`. With 1, the edit doesn't change the norm.
    """

    keep_norm: bool | float = field(default=False, kw_only=True)

    kernel: ClassVar[Any]  # a Kernel; mypy would treat a callable class attribute as a method

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        """Register the operation under `name`, which files and messages use."""
        super().__init_subclass__(**kwargs)
        if name is not None:
            OPERATIONS[name] = cls
            NAMES[cls] = name

    def __new__(cls, *_args: Any, **kwargs: Any) -> Any:
        check_fields(cls, kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_norm", as_share(self.keep_norm))

    def row(self, strength: float) -> Rows:
        """The kernel's parameters at this strength: vectors `[width]` or `[1]`, or a `LowRank`."""
        raise NotImplementedError

    def call(self, strength: float) -> tuple[Kernel, Rows]:
        """The kernel and the parameters to run at this strength, by default `kernel` and `row`.

        An operation may have a cheaper pair with the same effect at some strengths. It is merged with other
        operations only by its own `kernel`.
        """
        return self.kernel, self.row(strength)

    @property
    def width(self) -> int:
        """The width of the activations that it acts on; 0 means any."""
        raise NotImplementedError

    @property
    def norm(self) -> float:
        """The norm of its direction; the Frobenius norm if it writes several."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return self is other or all(
            tensors_equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b) and a == b
            for a, b in pairs
        )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Computed once: tensors may be large, and engines use the hash often."""
        values: list[Any] = [getattr(self, f.name) for f in fields(self)]
        return hash((type(self), *(v.numpy().tobytes() if isinstance(v, Tensor) else v for v in values)))

    def check_unchanged(self) -> None:
        """Raise `TrimtabError` if one of its tensors was changed in place since the first call of this method.

        Engines cache what they compute from an operation, and would keep using the old values.
        """
        values = (getattr(self, f.name) for f in fields(self))
        versions = tuple(v._version for v in values if isinstance(v, Tensor) and not v.is_inference())
        if self.__dict__.setdefault("_versions", versions) != versions:
            raise TrimtabError(
                f"the tensors of {self!r} were changed in place after it had been used; an operation can't be changed:"
                " create another one with the new values, or multiply the steering"
            )

    def __getstate__(self) -> dict[str, Any]:
        """The fields without cached values: hashes are only valid in this process, and device copies aren't pickled."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __repr__(self) -> str:
        shown = [f"width={self.width}", f"norm={self.norm:.4g}"]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in ("direction", "keep_norm"):
                shown.append(f"{f.name}={list(value.shape) if isinstance(value, Tensor) else repr(value)}")
        return f"{type(self).__name__}({', '.join(shown)}{f', keep_norm={self.keep_norm}' if self.keep_norm else ''})"


@dataclass(frozen=True, eq=False, repr=False)
class Directed(Operation):
    """An operation with one vector `[width]`: a direction, a mask, or thresholds."""

    direction: Tensor

    @property
    def width(self) -> int:
        return self.direction.shape[0]

    @property
    def norm(self) -> float:
        return float(self.direction.double().norm())


@dataclass(frozen=True, eq=False, repr=False)
class Add(Directed, name="add"):
    """`x' = x + strength * direction` (activation addition; CAA, ActAdd and most others).

    The direction is `[width]`, with any norm. At strength 1 it is added as it is.

    Examples:
        >>> kernel, rows = Add(torch.tensor([3.0, 4.0])).call(strength=2.0)
        >>> kernel(torch.tensor([1.0, 1.0]), rows).tolist()
        [7.0, 9.0]
    """

    kernel: ClassVar[Any] = staticmethod(add)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_direction(self.direction))

    def row(self, strength: float) -> dict[str, Tensor]:
        return {"vector": strength * self.direction}


@dataclass(frozen=True, eq=False, repr=False)
class SetProjection(Directed, name="set_projection"):
    """`x' = x + strength * (target - x.u) u`: moves the projection on a unit direction to `target`.

    Strength 1 sets it exactly (Stolfo et al., 2410.12877, section 3.2), 0 doesn't change it, and 0.5 moves it halfway.
    With `one_sided`, the projection is only raised: activations at or above the target don't change. The target is in
    units of the residual stream.

    Consecutive projections at one layer, including `Ablate`, are solved jointly (see `projections`): each reaches its
    target, whatever the angle between their directions. A one-sided one with nothing to raise keeps its projection
    constant.

    Examples:
        Along the first axis the activation goes from 1 to 4, or halfway, and nothing else changes:

        >>> operation = SetProjection(torch.tensor([1.0, 0.0]), target=4.0)
        >>> for strength in (1.0, 0.5):
        ...     rows = solve_projections([operation.row(strength)], ["operation"])
        ...     print(set_projections(torch.tensor([1.0, 7.0]), rows).tolist())
        [4.0, 7.0]
        [2.5, 7.0]
    """

    target: float
    one_sided: bool = field(default=False, kw_only=True)

    kernel: ClassVar[Any] = staticmethod(set_projections)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_unit(self.direction))
        try:
            target = float(self.target)
        except (TypeError, ValueError):
            target = nan
        if not isfinite(target):
            raise TrimtabError(f"a projection's target is a finite number, got {self.target!r}")
        object.__setattr__(self, "target", target)
        if not isinstance(self.one_sided, bool):
            raise TrimtabError(f"one_sided is true or false, got {self.one_sided!r}")

    def row(self, strength: float) -> dict[str, Tensor]:
        return _projection(self.direction, self.target, strength, 0.0 if self.one_sided else -inf)


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Directed, name="ablate"):
    """`x' = x - strength * (x.u) u`: removes a unit direction (completely at strength 1).

    Equivalent to `SetProjection` with target 0, also when several act jointly.
    """

    kernel: ClassVar[Any] = staticmethod(set_projections)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_unit(self.direction))

    def row(self, strength: float) -> dict[str, Tensor]:
        return _projection(self.direction, 0.0, strength, -inf)


def _projection(direction: Tensor, target: float, share: float, floor: float) -> dict[str, Tensor]:
    ones = direction.new_ones(1)
    return {"direction": direction, "target": target * ones, "share": share * ones, "floor": floor * ones}


MERGE_ROWS: dict[Kernel, MergeRows] = {add: sum_vectors, set_projections: solve_projections}
"""For each kernel, a function that merges the rows of consecutive operations without `keep_norm` into one row.

Its second argument are names for error messages, usually the edits. A kernel without an entry is called once per
operation."""

ACCEPTS_OUT: WeakSet[Kernel] = WeakSet([set_projections])
"""Kernels that accept `out`, a tensor for the result, which may be the activations themselves."""

NEUTRAL: dict[Kernel, float] = {add: -0.0}
"""Kernels that are a single addition or multiplication, with the parameter that changes no activation, bit for bit."""
