"""A token drawn for each row of a batch: which tokens are kept, and one of them at a uniform random number.

The tokens of a row are laid side by side in the vocabulary's order, each as wide as it is probable, and the number
says where to look. So a row's token depends on its own logits and its own number alone, and on nothing else in the
batch. All of it is done on the device, which the host doesn't wait for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOST = 1024
"""On a CPU the likeliest so many tokens of a row are sorted; all are where these don't settle what is kept."""


@dataclass(frozen=True)
class Kept:
    """Which tokens may be drawn, row by row: `[rows, 1]` each, on the device.

    As transformers has them, in its order: the `top_k` likeliest; of these the likeliest whose probabilities come to
    `top_p`; of these what has at least `min_p` times the probability of the likeliest. Tokens that are exactly as
    likely as the last one that is kept are kept, too.
    """

    top_k: Tensor  # the size of the vocabulary, or more, keeps all
    top_p: Tensor  # 1 keeps all
    min_p: Tensor  # 0 keeps all

    @classmethod
    def of(cls, rows: list[tuple[int, float, float]], device: torch.device) -> Kept:
        """From each row's `(top_k, top_p, min_p)`."""
        columns = [torch.tensor(column, device=device)[:, None] for column in zip(*rows, strict=True)]
        return cls(columns[0], columns[1].float(), columns[2].float())

    def select(self, rows: Tensor) -> Kept:
        """The same for these rows, in this order."""
        return Kept(self.top_k[rows], self.top_p[rows], self.min_p[rows])

    def least(self, probabilities: Tensor) -> Tensor:
        """The least probability `[rows, 1]` that is kept, of probabilities `[rows, vocabulary]`."""
        if probabilities.device.type != "cpu":
            return self._least(probabilities.sort(-1, descending=True).values)[0]
        # torch's sort on a CPU takes ten times as long, as it sorts indices along
        values = probabilities.numpy()
        size = values.shape[-1]
        if size <= MOST:
            return self._least(_descending(values))[0]
        least, settled = self._least(_descending(np.partition(values, size - MOST)[:, -MOST:]))
        for row in (~settled[:, 0]).nonzero()[:, 0].tolist():
            kept = self.select(torch.tensor([row]))
            least[row] = kept._least(_descending(values[row : row + 1]))[0][0]
        return least

    def _least(self, likeliest: Tensor) -> tuple[Tensor, Tensor]:
        """By the likeliest tokens `[rows, some]`, best first; and whether there may be more to keep than these."""
        count = likeliest.shape[-1]
        last = self.top_k.clamp(max=count) - 1
        kept = likeliest >= likeliest.gather(-1, last)
        settled = self.top_k < count
        masses = (likeliest * kept).cumsum(-1)
        before = masses - likeliest
        # without top_k all tokens count, those that aren't here too
        whole = torch.where(settled, masses[:, -1:], 1.0)
        kept &= (before < self.top_p * whole) | (self.top_p >= 1)
        kept &= likeliest >= self.min_p * likeliest[:, :1]
        kept[:, 0] = True
        fewest = kept.sum(-1, keepdim=True)
        return likeliest.gather(-1, fewest - 1), settled | (fewest < count)


def _descending(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.sort(values, axis=-1)).flip(-1)


def draw(weights: Tensor, numbers: Tensor, likeliest: Tensor) -> Tensor:
    """One token `[rows, 1]` for each row of weights `[rows, vocabulary]`, which needn't sum to one.

    `numbers` lie between 0 and 1, which is left out; `likeliest` are the tokens of the greatest weights: `[rows, 1]`.
    """
    sums = weights.cumsum(-1)
    drawn = torch.searchsorted(sums, numbers.to(sums) * sums[:, -1:], right=True)
    drawn = drawn.clamp_(max=weights.shape[-1] - 1)
    # sums are rounded, and on a GPU not even sure to rise: a token that can't come is replaced by the likeliest
    fits = weights.gather(-1, drawn) > 0
    return torch.where(fits, drawn, likeliest)
