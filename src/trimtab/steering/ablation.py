"""Directional ablation: a direction is removed from everything that is written to the residual stream.

Arditi et al., Refusal Is Mediated by a Single Direction, 2406.11717, sections 2.4 and 4.1:

x' <- x - r r^T x        for the embeddings and for the output of every attention and every MLP
"""

from __future__ import annotations

from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.steering.card import Card
from trimtab.steering.operations import Ablate
from trimtab.steering.positions import Positions
from trimtab.steering.site import Site
from trimtab.steering.steering import Edit, Steering
from trimtab.steering.tensors import as_direction


@keywords
def directional_ablation(direction: Tensor, layers: int) -> Steering:
    """Ablate a direction from every component that writes to the residual stream, at every token.

    The stream is the sum of the embeddings and of the outputs of all attentions and MLPs, so the direction is removed
    from it completely, also between attention and MLP. Ablating only the output of each block isn't equivalent:
    there the MLP still reads what the attention of its block wrote. `trimtab.bake` turns this steering into
    orthogonalized weights ("abliteration").

    In families that have a norm after attention and MLP (Gemma 2 and 3, OLMo 2), the input of that norm is ablated,
    and the norm's per-channel weights bring some of the direction back.

    Args:
        direction: The direction `[width]`, of any norm but zero.
        layers: The number of the model's blocks (`lm.layout.layers`).

    Returns:
        The steering: `Ablate` at `block_input[0]`, and at `attention` and `mlp` of every layer.

    Raises:
        TrimtabError: The direction is not a finite vector, or is zero, or there are no layers.
    """
    vector = as_direction(direction)
    norm = float(vector.double().norm())
    if not norm > 0:
        raise TrimtabError("the direction is all zeros, so there is nothing to ablate; learn it again")
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise TrimtabError(f"layers is the model's number of blocks (lm.layout.layers), got {layers!r}")
    ablate = Ablate((vector.double() / norm).to(vector.dtype))
    sites = [Site(0, "block_input")]
    sites += [Site(layer, kind) for layer in range(layers) for kind in ("attention", "mlp")]
    return Steering(tuple(Edit(site, ablate, Positions.all()) for site in sites), Card("directional_ablation"))
