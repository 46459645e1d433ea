"""A shift of activations as a low-rank function of them: reduced-rank ridge regression, in closed form.

PSR (arXiv 2605.03907) models a prompt's effect on an activation as a function of the activation. Here it is

    delta ~ x W + b      by ridge regression,      W <- W V Vᵀ      with V the leading directions of the fitted shift
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.tensors import check_finite, to_float64

RIDGE = 0.02
"""The ridge penalty, relative to the mean diagonal of the activations' covariance."""


@dataclass(frozen=True)
class ReducedRankMap:
    """`x + x readᵀ write + vector`: `read` and `write` are `[rank, width]`, `vector` is `[width]`.

    `explained` is the share of the shift's energy that it explains on the training data, 0 … 1.
    """

    read: Tensor
    write: Tensor
    vector: Tensor
    explained: float


def reduced_rank(x: Tensor, delta: Tensor, rank: int, ridge: float = RIDGE) -> ReducedRankMap:
    """Fit a map of rank `rank` from activations `x` to their shifts `delta`.

    Args:
        x: The activations, `[tokens, width]`.
        delta: The shift of each activation, `[tokens, width]`.
        rank: The maximum rank; 0 gives only the mean shift.
        ridge: The penalty on W, in units of the mean diagonal of the covariance of `x`.

    Returns:
        The map.

    Raises:
        TrimtabError: Shapes differ, there are no tokens, or values aren't finite.
    """
    if x.shape != delta.shape or x.dim() != 2 or not len(x):
        raise TrimtabError(
            f"activations and their shifts are [tokens, width], got {list(x.shape)}, {list(delta.shape)}"
        )
    x, delta = to_float64(x), to_float64(delta)
    for activations in (x, delta):
        check_finite(activations)
    mean_x, mean_delta = x.mean(0), delta.mean(0)
    centred, shift = x - mean_x, delta - mean_delta
    width = x.shape[1]
    rank = min(rank, width)
    if rank and bool(centred.any()):
        moment = centred.T @ centred
        moment.diagonal().add_(ridge * moment.diagonal().mean())
        weights = torch.linalg.solve(moment, centred.T @ shift)  # [width, width]
        fitted_shift = centred @ weights
        # the leading directions of the fitted shift
        directions = torch.linalg.eigh(fitted_shift.T @ fitted_shift).eigenvectors[:, -rank:].flip(1).T
        read = directions @ weights.T
    else:
        directions = read = x.new_zeros(0, width)
    vector = mean_delta - (mean_x @ read.T) @ directions
    residual = delta - ((x @ read.T) @ directions + vector)
    energy = float(delta.square().sum())
    explained = max(0.0, 1 - float(residual.square().sum()) / energy) if energy else 1.0
    return ReducedRankMap(read.float(), directions.float(), vector.float(), explained)
