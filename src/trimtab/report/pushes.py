"""How hard each edit of a steering pushes, as far as its card tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.errors import UnsupportedError
from trimtab.steering import Add, ScaleKeys, ScoreOperation, SetProjection, Steering


@dataclass(frozen=True)
class Push:
    """One edit. `norm` is its direction's, times the strength where the operation adds; where it writes several
    directions, the root of their squares' sum; where it sets a projection,
    the mean shift that the instruction itself makes there, times the strength, if the card has it.

    `activation_norm` is the mean norm of the activations it was learned from, `agreement` the mean cosine of the
    pairs' differences to their mean: both `None` where the card doesn't say.
    """

    layer: int
    norm: float
    activation_norm: float | None
    agreement: float | None

    @property
    def share(self) -> float | None:
        """The norm of the push in norms of the activation: near 1 and above, text tends to break."""
        return self.norm / self.activation_norm if self.activation_norm else None


def pushes(steering: Steering) -> list[Push]:
    """One `Push` an edit, in the edits' order. A sum's edits have no measurements: several cards could be theirs.

    Raises `UnsupportedError` for edits of attention scores, or of keys by a factor, which push in no direction.
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
