"""Norms of activations, for doses: in float32 or wider, and where they are kept."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_into(out: Tensor, x: Tensor) -> None:
    """Put the norms of activations there, which may be on another device."""
    if out.device == x.device:
        torch.linalg.vector_norm(x, dim=-1, dtype=out.dtype, out=out)
    else:
        out.copy_(norm(x))


def norm(x: Tensor) -> Tensor:
    """The norm of each activation `[..., width]`, in float32 or wider."""
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
