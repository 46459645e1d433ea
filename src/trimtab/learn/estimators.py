"""Estimators: functions that compute a direction from the activations of both sides of pairs.

An estimator is a function of the positives' and the negatives' activations, each `[pairs, width]`, one row per pair, in
float64 on the CPU. It returns the direction from the negatives to the positives, `[width]`. Unless a method rescales
it, its norm is what strength 1 adds: the mean shift between the sides along it. Methods take an estimator as an
argument, so a new kind of direction only needs a function:

    def trimmed(positive, negative):
        differences = (positive - negative).sort(0).values
        return differences[len(differences) // 10 : -(len(differences) // 10) or None].mean(0)

    learn_caa(lm, pairs, estimator=trimmed)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.learn.probes import logistic
from trimtab.steering.tensors import to_float64

Estimator = Callable[[Tensor, Tensor], Tensor]


def mean_difference(positive: Tensor, negative: Tensor) -> Tensor:
    """The mean of positive minus negative (CAA, Rimsky et al.)."""
    return (positive - negative).mean(0)


def median(positive: Tensor, negative: Tensor) -> Tensor:
    """The elementwise median of positive minus negative, which is robust to a few outliers."""
    ordered = (positive - negative).sort(0).values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def pca(positive: Tensor, negative: Tensor) -> Tensor:
    """The first principal component of the pairs' members, each minus its pair's mean (RepE, Zou et al.).

    The sign is such that most positives project above their negatives. (PCA of the differences themselves would first
    subtract their mean, which is the wanted direction.)
    """
    centred = torch.cat([positive - negative, negative - positive]) / 2  # their mean is 0
    return _scale_to_mean_distance(_orient(_first_component(centred), positive, negative), positive, negative)


def probe(positive: Tensor, negative: Tensor) -> Tensor:
    """The weight of a logistic regression that separates positives from negatives (like ITI's probes, Li et al.).

    Activations are centered and scaled by one number to a root mean square of 1, so that the penalty (scikit-learn's
    with `C = 1`) means the same for all layers and models.
    """
    members = torch.cat([positive, negative])
    members = members - members.mean(0)
    scale = float(members.square().mean().sqrt())
    basis = torch.linalg.qr(members.T).Q  # the weight is in the span of the members: [width, members]
    labels = torch.tensor([1, 0]).repeat_interleave(len(positive))
    weight, _ = logistic(members @ basis / (scale or 1.0), labels)
    return _scale_to_mean_distance(unit(basis @ weight), positive, negative)


def random_order(seed: int = 0) -> Estimator:
    """An estimator: the first principal component of the differences with random signs, centered (RepE).

    The sign of the result is such that most positives project above their negatives.
    """

    def estimator(positive: Tensor, negative: Tensor) -> Tensor:
        signs = torch.randint(0, 2, (len(positive), 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
        differences = (positive - negative) * signs
        first = _first_component(differences - differences.mean(0))
        return _scale_to_mean_distance(_orient(first, positive, negative), positive, negative)

    return estimator


ESTIMATORS: Mapping[str, Estimator] = {
    "mean-difference": mean_difference,
    "median": median,
    "pca": pca,
    "probe": probe,
}
"""The estimators by their names on the command line and in cards."""


def as_estimator(value: str | Estimator, known: Mapping[str, Estimator] = ESTIMATORS) -> Estimator:
    """The known estimator of that name, or the given function.

    Raises:
        TrimtabError: The value is neither.
    """
    if isinstance(value, str) and value in known:
        return known[value]
    if isinstance(value, str) or not callable(value):
        raise TrimtabError(
            f"there is no estimator {value!r}; estimators: {', '.join(known)}, or a function of the positives' and the"
            " negatives' activations, each [pairs, width], that returns a direction [width]"
        )
    return value


def estimator_name(value: str | Estimator, known: Mapping[str, Estimator] = ESTIMATORS) -> str:
    """The estimator's name in a card: that of a known one, else `module:function`."""
    if isinstance(value, str):
        return value
    for name, estimator in known.items():
        if estimator is value:
            return name
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}:{kind.__qualname__}"


def estimate(estimator: Estimator, positive: Tensor, negative: Tensor) -> Tensor:
    """The estimator's direction `[width]`, in float64 on the CPU.

    Args:
        estimator: The function.
        positive: The positives' activations, `[pairs, width]`, in any dtype.
        negative: The negatives' activations, likewise.

    Returns:
        The direction.

    Raises:
        TrimtabError: The function returns anything but a finite direction of that width.
    """
    positive, negative = to_float64(positive), to_float64(negative)
    direction = estimator(positive, negative)
    if not isinstance(direction, Tensor) or direction.shape != positive.shape[1:] or not direction.is_floating_point():
        what = (
            f"{direction.dtype} of shape {list(direction.shape)}"
            if isinstance(direction, Tensor)
            else type(direction).__name__
        )
        raise TrimtabError(
            f"the estimator {estimator_name(estimator)} returned {what}; a direction is a floating-point tensor of"
            f" shape [{positive.shape[1]}]"
        )
    if not bool(torch.isfinite(direction).all()):
        raise TrimtabError(
            f"the estimator {estimator_name(estimator)} returned a direction with NaN or infinite values"
        )
    return to_float64(direction)


def unit(direction: Tensor) -> Tensor:
    """The direction, normalized to 1. Raises `TrimtabError` for a zero direction."""
    norm = float(direction.norm())
    if not norm > 0:
        raise TrimtabError("the two sides of the pairs don't differ there, so there is no direction")
    return direction / norm


def _orient(direction: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """The direction with the sign by which most positives project above their negatives; if tied, their mean does."""
    along = (positive - negative) @ direction
    votes = float(torch.sign(along).sum()) or float(along.sum())
    return direction if votes >= 0 else -direction


def _scale_to_mean_distance(direction: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """A unit direction, scaled to the distance between the sides' means along it."""
    return direction * ((positive - negative).mean(0) @ direction).abs()


def _first_component(rows: Tensor) -> Tensor:
    if not bool(rows.any()):
        raise TrimtabError("the two sides of the pairs don't differ there, so there is no direction")
    return torch.linalg.svd(rows, full_matrices=False).Vh[0]
