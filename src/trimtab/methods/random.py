"""Random directions of the same norm: the control of most steering papers, e.g. Rimsky et al., arXiv 2312.06681.

r ~ uniform on the sphere,   v' = |v| r        replaces each learned direction v
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from trimtab.files.steering_file import steering_digest
from trimtab.keywords import keywords
from trimtab.learn.contrast import check_layers
from trimtab.learn.inputs import check_lm
from trimtab.steering import Add, Card, Edit, Positions, Site, Steering
from trimtab.steering.random_edits import random_edits, random_unit

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM
    from trimtab.learn.contrast import Progress


DEPTH = 0.4


@keywords
def learn_random(
    lm: LM,
    layers: int | Sequence[int] | None = None,
    *,
    like: Steering | None = None,
    length: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Steering:
    """Make a steering in random directions, either modeled on `like` or as additions of a given norm.

    Args:
        lm: The model.
        layers: The blocks to steer after (default: one, at 0.4 of the depth); with `like`, those of its layers to keep
            (default: all).
        like: A steering whose directions are replaced by random ones of the same norms.
        length: Without `like`, the norm of the additions at strength 1.
        seed: The seed of the directions.
        progress: Not used.

    Returns:
        The steering.

    Raises:
        TrimtabError: A layer doesn't exist, or an operation has no direction.
    """
    check_lm(lm)
    if like is not None:
        steering = like if layers is None else like.only([layers] if isinstance(layers, int) else layers)
        options = {"seed": seed, "like": steering_digest(steering)}
        return Steering(random_edits(steering, seed), Card("random", lm.identity, options=options))
    chosen = check_layers(lm, layers, DEPTH)
    generator = torch.Generator().manual_seed(seed)
    edits = tuple(
        Edit(
            Site(layer),
            Add((length * random_unit(lm.layout.width, generator)).float()),
            Positions.from_last_prompt_token(),
        )
        for layer in chosen
    )
    return Steering(edits, Card("random", lm.identity, options={"layers": chosen, "length": length, "seed": seed}))
