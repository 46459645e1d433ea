"""Batched logistic probes, for example one for each head of a model."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.errors import TrimtabError

STEPS = 60
TOLERANCE = 1e-9


def logistic(x: Tensor, y: Tensor, penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """The weights `[..., width]` and biases `[...]` of logistic regressions of `y` on `x`, in float64.

    `x` is `[..., n, width]`, with one regression per index of the leading dimensions; `y` `[n]` is 0 or 1. Each
    minimizes the sum of the n log losses plus `penalty / 2 * |weight|²` (scikit-learn's `C = 1 / penalty`); the bias
    isn't penalized. Uses Newton's method, with steps halved while the loss would increase.

    Raises `TrimtabError` unless `y` has both values and the penalty is above 0.
    """
    labels = y.to(torch.float64)
    if not bool(((labels == 0) | (labels == 1)).all()) or not 0 < float(labels.mean()) < 1:
        raise TrimtabError("a probe needs examples of both kinds, labelled 0 and 1")
    if not penalty > 0:
        raise TrimtabError(f"a probe's penalty is above 0, got {penalty}")
    x = x.to(torch.float64)
    ones = x.new_ones(*x.shape[:-1], 1)
    inputs = torch.cat([x, ones], -1)
    ridge = torch.full((inputs.shape[-1],), float(penalty), dtype=torch.float64)
    ridge[-1] = 0
    theta = x.new_zeros(*x.shape[:-2], inputs.shape[-1])

    def loss(theta: Tensor) -> Tensor:
        z = (inputs @ theta[..., None])[..., 0]
        return (torch.nn.functional.softplus(z) - labels * z).sum(-1) + (ridge * theta**2).sum(-1) / 2

    current_loss = loss(theta)
    for _ in range(STEPS):
        p = (inputs @ theta[..., None])[..., 0].sigmoid()
        gradient = (inputs.mT @ (p - labels)[..., None])[..., 0] + ridge * theta
        if float(gradient.abs().max()) < TOLERANCE * len(labels):
            break
        curvature = inputs.mT @ (inputs * (p * (1 - p))[..., None]) + torch.diag(ridge)
        curvature.diagonal(dim1=-2, dim2=-1)[...] += 1e-12  # the bias has no penalty
        step = torch.linalg.solve(curvature, gradient[..., None])[..., 0]
        share = torch.ones_like(current_loss)
        for _ in range(30):
            new_loss = loss(theta - share[..., None] * step)
            worse = new_loss > current_loss
            if not bool(worse.any()):
                break
            share = torch.where(worse, share / 2, share)
        theta = torch.where((new_loss <= current_loss)[..., None], theta - share[..., None] * step, theta)
        current_loss = torch.minimum(new_loss, current_loss)
    return theta[..., :-1], theta[..., -1]
