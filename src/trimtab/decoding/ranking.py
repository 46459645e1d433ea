"""Which layers matter most: each is steered alone, and the disturbance that spreads is measured
(DIRECTER, 2603.06745, section 3).

`pre[j]` is what the attention of layer j is given, `post[j]` what it gives, before it is added to the residual stream;
`l` marks the pass in which layer l alone was steered, and `dist` is the cosine distance.

    D_j(l) = [dist(pre_j, post_j^l) - dist(pre_j, post_j)] + [dist(pre_j^l, post_j) - dist(pre_j, post_j)]
    sensitivity(l) = mean over j of D_j(l)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def disturbance(pre: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    """One layer's column of the table: `[rows - 1]` distances with a raw row 0, and the raw distance `[]`.

    `pre` and `post` are `[rows, width]`; row 0 is unsteered, row l + 1 has layer l alone steered. The first result
    is `dist(pre_j, post_j^l) + dist(pre_j^l, post_j)`, the second `dist(pre_j, post_j)`; in float32 or wider.
    """
    wide = torch.promote_types(pre.dtype, torch.float32)
    pre, post = pre.to(wide), post.to(wide)
    crossed = 2 - cosine_similarity(pre[:1], post[1:], dim=-1) - cosine_similarity(pre[1:], post[:1], dim=-1)
    return crossed, 1 - cosine_similarity(pre[0], post[0], dim=-1)


def sensitivity(crossed: Tensor, raw: Tensor, ranking: str) -> Tensor:
    """The score of each layer, `[layers]`, from `crossed[l, j]` and `raw[j]` of `disturbance`.

    `"paper"` averages over the observed layers j what layer l's steering adds. `"repo"` is what the released code
    computes instead: nothing is subtracted, and the mean is taken over the *steered* layers, so that the score is
    that of the observed one.
    """
    if ranking == "repo":
        return crossed.clamp(min=0).mean(0)
    return (crossed - 2 * raw).mean(1)


def order_of(scores: Tensor, layers: list[int]) -> tuple[int, ...]:
    """The layers by falling score; of equal ones the lower first. `scores[i]` is that of `layers[i]`."""
    by_layer = sorted(range(len(layers)), key=lambda i: layers[i])
    return tuple(layers[i] for i in sorted(by_layer, key=lambda i: -float(scores[i])))
