"""Directions from pairs of activations: the mean difference, and principal components that don't lose it."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.errors import TrimtabError


def mean_difference(positive: Tensor, negative: Tensor) -> Tensor:
    """The unit mean difference of `[pairs, width]` activations. Raises `TrimtabError` where the sides don't differ."""
    return unit((positive - negative).mean(0))


def centred_members(positive: Tensor, negative: Tensor) -> Tensor:
    """The first principal component of the pairs' members, each less its pair's mean: unit `[width]`.

    The sign is that by which most positives project above their negatives. (PCA of the differences themselves would
    subtract their mean first, which is the direction sought.)
    """
    centred = torch.cat([positive - negative, negative - positive]) / 2  # their mean is 0
    return signed(_first(centred), positive, negative)


def random_order(positive: Tensor, negative: Tensor, seed: int = 0) -> Tensor:
    """The first principal component of the pairs' differences, each in a random order, centred (RepE): unit `[width]`.

    The sign is that by which most positives project above their negatives.
    """
    signs = torch.randint(0, 2, (len(positive), 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    differences = (positive - negative) * signs
    return signed(_first(differences - differences.mean(0)), positive, negative)


def signed(direction: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """The direction turned so that more positives project above their negatives than below; on a tie, so that they
    do on the mean."""
    along = (positive - negative) @ direction
    votes = float(torch.sign(along).sum()) or float(along.sum())
    return direction if votes >= 0 else -direction


def unit(direction: Tensor) -> Tensor:
    """The direction at length 1. Raises `TrimtabError` for a zero one."""
    norm = float(direction.norm())
    if not norm > 0:
        raise TrimtabError("the two sides of the pairs don't differ there, so there is no direction")
    return direction / norm


def _first(rows: Tensor) -> Tensor:
    if not bool(rows.any()):
        raise TrimtabError("the two sides of the pairs don't differ there, so there is no direction")
    return torch.linalg.svd(rows.double(), full_matrices=False).Vh[0]
