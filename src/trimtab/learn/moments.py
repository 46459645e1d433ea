"""Streaming sums of activations, whose memory doesn't grow with the number of pairs; and all activations if needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.learn.estimators import Estimator, estimate, unit
from trimtab.steering.tensors import to_float64


@dataclass
class PairMoments:
    """Sums over pairs of activations at one site, in float64 on the CPU.

    `add` takes a batch of positive and of negative activations, each `[pairs, width]`.
    """

    width: int
    count: int = 0

    def __post_init__(self) -> None:
        self.positive_sum = torch.zeros(self.width, dtype=torch.float64)
        self.negative_sum = torch.zeros(self.width, dtype=torch.float64)
        self.unit_sum: torch.Tensor = torch.zeros(self.width, dtype=torch.float64)
        self.norm_sum: torch.Tensor = torch.zeros((), dtype=torch.float64)

    def add(self, positive: Tensor, negative: Tensor) -> None:
        positive, negative = to_float64(positive), to_float64(negative)
        difference = positive - negative
        self.count += len(positive)
        self.positive_sum += positive.sum(0)
        self.negative_sum += negative.sum(0)
        self.unit_sum += (difference / difference.norm(dim=-1, keepdim=True).clamp_min(1e-300)).sum(0)
        self.norm_sum += (positive.norm(dim=-1) + negative.norm(dim=-1)).sum() / 2

    @property
    def difference(self) -> Tensor:
        """The mean difference, positive minus negative: `[width]`."""
        return (self.positive_sum - self.negative_sum) / self.count

    @property
    def agreement(self) -> float:
        """The mean cosine of the pairs' differences with their mean, from -1 to 1. Low means a weak steering."""
        norm = float(self.difference.norm())
        return float(self.unit_sum @ self.difference) / (self.count * norm) if norm else 0.0

    @property
    def norm(self) -> float:
        """The mean norm of the activations, in units of the residual stream."""
        return float(self.norm_sum) / self.count

    @property
    def direction(self) -> Tensor:
        """The unit mean difference: `[width]`. Raises `TrimtabError` if the two sides don't differ."""
        return unit(self.difference)

    def target(self) -> float:
        """The positives' mean projection on the unit mean difference (Stolfo et al., section 3.2)."""
        return float(self.positive_sum @ self.direction) / self.count


@dataclass
class PairMembers(PairMoments):
    """`PairMoments` that also keep every pair's activations, for directions that sums don't determine.

    The memory is 16 bytes times pairs times width at each site.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.members: list[tuple[Tensor, Tensor]] = []

    def add(self, positive: Tensor, negative: Tensor) -> None:
        super().add(positive, negative)
        self.members.append((to_float64(positive), to_float64(negative)))

    def estimate_direction(self, estimator: Estimator) -> Tensor:
        """The estimator's direction: `[width]`. Raises `TrimtabError` as `estimate` does."""
        positive, negative = (torch.cat([batch[side] for batch in self.members]) for side in (0, 1))
        return estimate(estimator, positive, negative)
