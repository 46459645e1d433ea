"""Ranking of layers by sensitivity: each layer is steered alone, and the disturbance of all layers is measured
(DIRECTER, 2603.06745, section 3).

`pre[j]` is the input of layer j's attention and `post[j]` its output, before it is added to the residual stream. `^l`
marks the pass in which only layer l is steered, and `dist` is the cosine distance.

    D_j(l) = [dist(pre_j, post_j^l) - dist(pre_j, post_j)] + [dist(pre_j^l, post_j) - dist(pre_j, post_j)]
    sensitivity(l) = mean over j of D_j(l)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def disturbance(pre: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    """The distances at one observed layer j: `[rows - 1]` with steering, and the unsteered one `[]`.

    `pre` and `post` are `[rows, width]`; row 0 is unsteered, and in row l + 1 only layer l is steered. The first result
    is `dist(pre_j, post_j^l) + dist(pre_j^l, post_j)`, the second `dist(pre_j, post_j)`; in float32 or wider.
    """
    wide = torch.promote_types(pre.dtype, torch.float32)
    pre, post = pre.to(wide), post.to(wide)
    crossed = 2 - cosine_similarity(pre[:1], post[1:], dim=-1) - cosine_similarity(pre[1:], post[:1], dim=-1)
    return crossed, 1 - cosine_similarity(pre[0], post[0], dim=-1)


def sensitivity(crossed: Tensor, raw: Tensor, ranking: str) -> Tensor:
    """The score of each layer, `[layers]`, from `crossed[l, j]` and `raw[j]` of `disturbance`.

    `"paper"` averages the increase that steering layer l causes over the observed layers j. `"repo"` is the formula of
    the released code: nothing is subtracted, and the mean is over the *steered* layers, so that the score belongs to
    the observed layer.
    """
    if ranking == "repo":
        return crossed.clamp(min=0).mean(0)
    return (crossed - 2 * raw).mean(1)


def order_layers(scores: Tensor, layers: list[int]) -> tuple[int, ...]:
    """The layers by descending score; ties by layer number. `scores[i]` is the score of `layers[i]`."""
    by_layer = sorted(range(len(layers)), key=lambda i: layers[i])
    return tuple(layers[i] for i in sorted(by_layer, key=lambda i: -float(scores[i])))
