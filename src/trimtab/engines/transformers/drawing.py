"""Sampling one token per row: top-k, top-p and min-p filtering, then inverse transform sampling.

A row's token is the one at which the cumulative probability, in vocabulary order, exceeds a uniform random number. So
it depends only on the row's own logits and random number, not on the rest of the batch. All of this runs on the device,
without a host sync.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOST = 1024
"""On a CPU, only this many of a row's likeliest tokens are sorted; all are if these don't determine which are kept."""


@dataclass(frozen=True)
class SamplingLimits:
    """Each row's limits on which tokens may be sampled: `[rows, 1]` each, on the device.

    They are applied as in transformers, and in the same order: the `top_k` likeliest tokens; of these, the likeliest
    whose probabilities sum to `top_p`; of these, the ones with at least `min_p` times the probability of the likeliest.
    Tokens that tie with the last one kept are kept, too.
    """

    top_k: Tensor  # the size of the vocabulary, or more, keeps all
    top_p: Tensor  # 1 keeps all
    min_p: Tensor  # 0 keeps all

    @classmethod
    def of(cls, rows: list[tuple[int, float, float]], device: torch.device) -> SamplingLimits:
        """Make limits from each row's `(top_k, top_p, min_p)`."""
        columns = [torch.tensor(column, device=device)[:, None] for column in zip(*rows, strict=True)]
        return cls(columns[0], columns[1].float(), columns[2].float())

    def select(self, rows: Tensor) -> SamplingLimits:
        """The limits of these rows, in this order."""
        return SamplingLimits(self.top_k[rows], self.top_p[rows], self.min_p[rows])

    def min_kept_probability(self, probabilities: Tensor) -> Tensor:
        """The lowest probability `[rows, 1]` that is kept, given probabilities `[rows, vocabulary]`."""
        if probabilities.device.type != "cpu":
            return self._min_kept(probabilities.sort(-1, descending=True).values)[0]
        # on a CPU, torch's sort takes ten times as long, because it also sorts indices
        values = probabilities.numpy()
        size = values.shape[-1]
        if size <= MOST:
            return self._min_kept(_descending(values))[0]
        least, settled = self._min_kept(_descending(np.partition(values, size - MOST)[:, -MOST:]))
        for row in (~settled[:, 0]).nonzero()[:, 0].tolist():
            kept = self.select(torch.tensor([row]))
            least[row] = kept._min_kept(_descending(values[row : row + 1]))[0][0]
        return least

    def _min_kept(self, likeliest: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest kept probability `[rows, 1]`, given those of the likeliest tokens `[rows, some]`, best first.

        Also returns whether it is certain, rather than dependent on tokens that aren't given.
        """
        count = likeliest.shape[-1]
        last = self.top_k.clamp(max=count) - 1
        kept = likeliest >= likeliest.gather(-1, last)
        settled = self.top_k < count
        masses = (likeliest * kept).cumsum(-1)
        before = masses - likeliest
        # without top_k, top_p is a share of all tokens, including those that aren't given
        whole = torch.where(settled, masses[:, -1:], 1.0)
        kept &= (before < self.top_p * whole) | (self.top_p >= 1)
        kept &= likeliest >= self.min_p * likeliest[:, :1]
        kept[:, 0] = True
        fewest = kept.sum(-1, keepdim=True)
        return likeliest.gather(-1, fewest - 1), settled | (fewest < count)


def _descending(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.sort(values, axis=-1)).flip(-1)


def draw(weights: Tensor, numbers: Tensor, likeliest: Tensor) -> Tensor:
    """Sample one token `[rows, 1]` for each row of weights `[rows, vocabulary]`, which needn't sum to one.

    `numbers` are uniform in [0, 1); `likeliest` are the tokens with the greatest weights; both are `[rows, 1]`.
    """
    sums = weights.cumsum(-1)
    drawn = torch.searchsorted(sums, numbers.to(sums) * sums[:, -1:], right=True)
    drawn = drawn.clamp_(max=weights.shape[-1] - 1)
    # sums are rounded, and on a GPU not even monotonic: a token of weight zero is replaced by the likeliest
    fits = weights.gather(-1, drawn) > 0
    return torch.where(fits, drawn, likeliest)
