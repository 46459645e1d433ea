"""A pretend MPS: tensors that are on no CPU, though their numbers are, and refuse float64 as MPS does.

They say `meta`, the one device besides the CPU that any build of torch can index on. `to("cpu", float64)` is refused as
well: whether it converts before or after it moves is torch's affair, and has changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

WHAT = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"


class OnMps(Tensor):
    """A tensor on the pretend device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnMps:
        if held.dtype == torch.float64:
            raise TypeError(WHAT)
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device="meta"
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") == torch.float64:
            raise TypeError(WHAT)
        leaves = func is torch.ops.aten._to_copy.default and str(kwargs.get("device")) == "cpu"
        if str(kwargs.get("device", "")).startswith("meta"):
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        return out if leaves else tree_map(lambda x: OnMps(x) if isinstance(x, Tensor) else x, out)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnMps) else x


def on_mps(x: Tensor) -> Tensor:
    """The same numbers on the pretend device. Raises `TypeError` for float64."""
    return OnMps(x)
