"""How hard each edit of a steering pushes, as far as its card says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.errors import UnsupportedError
from trimtab.steering import Add, ScaleKeys, ScoreOperation, SetProjection, Steering


@dataclass(frozen=True)
class Push:
    """How hard one edit pushes.

    `norm` is the norm of the direction, times the strength if the operation adds. For an operation that writes several
    directions it is the root of the sum of their squared norms. For one that sets a projection, it is the mean shift
    that the instruction itself makes, times the strength, if the card has this shift. `activation_norm` is the mean
    norm of the activations that the edit was learned from, and `agreement` the mean cosine between the pairs'
    differences and their mean; both are `None` if the card doesn't have them.
    """

    layer: int
    norm: float
    activation_norm: float | None
    agreement: float | None

    @property
    def share(self) -> float | None:
        """The relative norm of the push. At values near 1 and above, text tends to break."""
        return self.norm / self.activation_norm if self.activation_norm else None


def pushes(steering: Steering) -> list[Push]:
    """One `Push` per edit, in order. A sum's edits have no measurements, since they could come from any of its cards.

    Raises `UnsupportedError` for edits of attention scores and for edits that scale keys, which have no direction.
    """
    listed = []
    for edit in steering.edits:
        if isinstance(edit.operation, (ScoreOperation, ScaleKeys)):
            raise UnsupportedError(f"{edit} steers attention: it has no direction, and so no push to show")
        layer = edit.site.layer
        measured = steering.card.measured
        adds = isinstance(edit.operation, Add)
        norm = edit.operation.norm * (abs(edit.strength) if adds else 1.0)
        shift = _at(measured.get("shift"), layer)
        if isinstance(edit.operation, SetProjection) and shift is not None:
            norm = shift * abs(edit.strength)
        listed.append(
            Push(layer, norm, _at(measured.get("activation_norm"), layer), _at(measured.get("agreement"), layer))
        )
    return listed


def _at(by_layer: Any, layer: int) -> float | None:
    value = by_layer.get(str(layer)) if isinstance(by_layer, dict) else None
    return float(value) if isinstance(value, (int, float)) else None
