"""The direction that a steering has at each layer, and how alike two steerings' are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.errors import TrimtabError
from trimtab.steering.operations import Add

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.steering.steering import Steering


def directions(steering: Steering) -> dict[int, Tensor]:
    """Its unit direction at each layer, `[width]` in float64, by layer in order.

    What is added with a negative strength is turned round. Raises `TrimtabError` when a layer has several edits, or
    an operation without a direction, or one of length 0.
    """
    layers = [edit.site.layer for edit in steering.edits]
    if len(set(layers)) < len(layers):
        raise TrimtabError("vectors are compared layer by layer, and a layer of this steering has several edits")
    by_layer = {}
    for edit in sorted(steering.edits, key=lambda edit: edit.site.layer):
        direction = getattr(edit.operation, "direction", None)
        if direction is None or not direction.any():
            raise TrimtabError(f"the edit at layer {edit.site.layer} has no direction")
        turned = -1.0 if isinstance(edit.operation, Add) and edit.strength < 0 else 1.0
        by_layer[edit.site.layer] = turned * direction.double() / direction.double().norm()
    return by_layer


def shared_cosines(first: Steering, other: Steering) -> dict[int, float]:
    """The cosine of both directions at each layer that both act at.

    Raises:
        TrimtabError: They share no layer, or at one of them not the site or the width; or as `directions` does.
    """
    a, b = directions(first), directions(other)
    shared = [layer for layer in a if layer in b]
    if not shared:
        mine, theirs = (", ".join(map(str, layers)) or "none" for layers in (a, b))
        raise TrimtabError(
            f"these steerings share no layer: the one acts at {mine}, the other at {theirs}; learn both at the same"
            " layers, or compare each layer with each by `trimtab inspect FILE FILE`"
        )
    sites = [{edit.site.layer: edit.site for edit in steering.edits} for steering in (first, other)]
    for layer in shared:
        here, there = sites[0][layer], sites[1][layer]
        if here != there:
            raise TrimtabError(
                f"at layer {layer} these steerings share no site: the one acts at {here}, the other at {there}"
            )
        if len(a[layer]) != len(b[layer]):
            raise TrimtabError(
                f"at layer {layer} these steerings share no width: {len(a[layer])} and {len(b[layer])}; they were"
                " learned on different models"
            )
    return {layer: float(a[layer] @ b[layer]) for layer in shared}
