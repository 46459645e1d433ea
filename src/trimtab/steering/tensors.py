"""Directions as plain data: validated, copied, and compared by value."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import TrimtabError

UNIT_TOLERANCE = 1e-3


def to_float64(x: Tensor) -> Tensor:
    """The tensor in float64 on the CPU. It is moved first and then converted, since MPS has no float64."""
    return x.detach().cpu().double()


def check_finite(x: Tensor, site: object = None) -> None:
    """Raises `TrimtabError` if activations, read at `site` if it is known, contain NaN or infinity."""
    if not torch.isfinite(x).all():
        where = "" if site is None else f" at {site}"
        raise TrimtabError(f"activations{where} are not finite; load the model in float32 or bfloat16")


def as_tensor(value: Any) -> Any:
    """A floating-point array (such as numpy's or pandas') as a tensor; anything else unchanged."""
    if isinstance(value, Tensor) or not hasattr(value, "__array__"):
        return value
    array = np.asarray(value)
    return torch.from_numpy(array.copy()) if array.dtype in (np.float16, np.float32, np.float64) else value


def as_direction(value: Any, name: str = "direction") -> Tensor:
    """A private CPU copy of a `[width]` vector, a tensor or an array, in float32 (float64 stays float64).

    Raises `TrimtabError` if it isn't one-dimensional and floating-point, or contains NaN or infinity.
    """
    value = as_tensor(value)
    if (
        not isinstance(value, Tensor)
        or value.dim() != 1
        or not value.is_floating_point()
        or value.layout != torch.strided
    ):
        what = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        fix = "; write torch.tensor(…)" if isinstance(value, list) else ""
        fix = "; give one of its rows" if isinstance(value, Tensor) and value.dim() == 2 else fix
        raise TrimtabError(f"a {name} is a floating-point tensor of shape [width], got {what}{fix}")
    if value.is_meta:
        raise TrimtabError(f"the {name} is on the meta device, where it has no values")
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    copy = value.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
    if not torch.isfinite(copy).all():
        bad = int((~torch.isfinite(copy)).sum())
        raise TrimtabError(f"the {name} contains {bad} values that are NaN or infinite; learn it again")
    return copy


def as_unit(value: Any, name: str = "direction") -> Tensor:
    """Like `as_direction`, for a vector of norm 1. Raises `TrimtabError` for any other norm."""
    copy = as_direction(value, name)
    norm = float(copy.double().norm())
    if abs(norm - 1) > UNIT_TOLERANCE:
        raise TrimtabError(f"the {name} must be a unit vector, its norm is {norm:.4g}; divide it by its norm")
    return copy


def as_matrix(value: Any, name: str) -> Tensor:
    """A private CPU copy of a `[rank, width]` matrix, of any rank from 0, in float32 (float64 stays float64).

    Raises `TrimtabError` if it isn't two-dimensional and floating-point, has width 0, or contains NaN or infinity.
    """
    value = as_tensor(value)
    if not isinstance(value, Tensor) or value.dim() != 2 or not value.is_floating_point() or not value.shape[1]:
        what = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TrimtabError(f"{name} is a floating-point tensor of shape [rank, width], got {what}")
    return as_direction(value.flatten(), name).view(value.shape)


def as_share(value: bool | float) -> bool | float:
    """The value of `keep_norm`: `False` for 0, `True` for 1, a float in between. Raises `TrimtabError` otherwise."""
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
        raise TrimtabError(f"keep_norm is true, false, or a share from 0 to 1, got {value!r}")
    return bool(value) if value in (0, 1) else float(value)


def tensors_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and values."""
    return a.dtype == b.dtype and torch.equal(a, b)
