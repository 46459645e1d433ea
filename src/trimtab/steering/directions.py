"""The direction of a steering at each layer, and the cosines between two steerings' directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.errors import TrimtabError
from trimtab.steering.cosines import Cosines
from trimtab.steering.operations import Add

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.steering.steering import Steering


def directions(steering: Steering) -> dict[int, Tensor]:
    """The steering's unit direction at each layer, `[width]` in float64, by layer in ascending order.

    The direction of an `Add` with a negative strength is negated. Raises `TrimtabError` if a layer has several edits,
    an operation without a direction, or a direction of norm 0.
    """
    layers = [edit.site.layer for edit in steering.edits]
    if len(set(layers)) < len(layers):
        raise TrimtabError("vectors are compared layer by layer, and a layer of this steering has several edits")
    by_layer = {}
    for edit in sorted(steering.edits, key=lambda edit: edit.site.layer):
        direction = getattr(edit.operation, "direction", None)
        if direction is None or not direction.any():
            raise TrimtabError(f"the edit at layer {edit.site.layer} has no direction")
        sign = -1.0 if isinstance(edit.operation, Add) and edit.strength < 0 else 1.0
        by_layer[edit.site.layer] = sign * direction.double() / direction.double().norm()
    return by_layer


def shared_cosines(first: Steering, other: Steering) -> Cosines:
    """The cosine between both directions at each layer at which both steerings act.

    Raises:
        TrimtabError: They share no layer, or differ in site or width at a shared one; or as in `directions`.
    """
    a, b = directions(first), directions(other)
    shared = [layer for layer in a if layer in b]
    if not shared:
        first_layers, other_layers = (", ".join(map(str, layers)) or "none" for layers in (a, b))
        raise TrimtabError(
            f"these steerings share no layer: one acts at {first_layers}, the other at {other_layers}; learn both at"
            " the same layers, or compare all pairs of layers with `trimtab inspect FILE FILE`"
        )
    sites = [{edit.site.layer: edit.site for edit in steering.edits} for steering in (first, other)]
    for layer in shared:
        first_site, other_site = sites[0][layer], sites[1][layer]
        if first_site != other_site:
            raise TrimtabError(
                f"at layer {layer} these steerings share no site: one acts at {first_site}, the other at {other_site}"
            )
        if len(a[layer]) != len(b[layer]):
            raise TrimtabError(
                f"at layer {layer} these steerings have different widths, {len(a[layer])} and {len(b[layer])}; they"
                " were learned on different models"
            )
    return Cosines((layer, float(a[layer] @ b[layer])) for layer in shared)
