"""An edit, and a steering: an ordered tuple of edits that can be scaled, summed, saved and applied."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.above import above
from trimtab.steering.attention import SCORE_NAMES, ScoreOperation
from trimtab.steering.card import Card
from trimtab.steering.directions import directions, shared_cosines
from trimtab.steering.gates import ALWAYS, Gate
from trimtab.steering.operations import NAMES
from trimtab.steering.positions import NAMED, Positions
from trimtab.steering.site import Site


@dataclass(frozen=True)
class Edit:
    """One operation at one site, at some positions, with a strength, on the requests that its gate lets in.

    Strength 0 is no edit at all. What a strength means is the operation's: a multiple of the direction for
    `Add`, a share of the way for `SetProjection` and `Ablate`.
    """

    site: Site
    operation: Any  # an Operation, or a ScoreOperation where the site is attention scores
    positions: Positions = NAMED["from-last-prompt-token"]
    strength: float = 1.0
    gate: Gate = ALWAYS

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", check_strength(self.strength))
        if isinstance(self.operation, ScoreOperation) != (self.site.kind == "scores"):
            raise TrimtabError(f"{type(self.operation).__name__} can't act at {self.site}")

    def __str__(self) -> str:
        gate = "" if self.gate == ALWAYS else f" when {self.gate}"
        operation = getattr(self.operation, "operation", self.operation)  # of a conditional one, what it does
        name = SCORE_NAMES[type(operation)] if isinstance(operation, ScoreOperation) else NAMES[type(operation)]
        return f"{self.strength:g} * {name} @ {self.site} {self.positions}{gate}"


@dataclass(frozen=True)
class Steering:
    """Edits in the order in which they act, and the card that says where they come from.

    Scaling and negating act on every edit's strength; a sum has the edits of both, in order. Two steerings
    are equal when their edits are; the card doesn't count.
    """

    edits: tuple[Edit, ...] = ()
    card: Card = field(default=Card(), compare=False)

    def __mul__(self, factor: float) -> Steering:
        factor = check_strength(factor)
        return replace(self, edits=tuple(replace(edit, strength=edit.strength * factor) for edit in self.edits))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Steering:
        return self * (1 / divisor)

    def __neg__(self) -> Steering:
        return self * -1.0

    def __add__(self, other: Steering) -> Steering:
        if not isinstance(other, Steering):
            return NotImplemented
        parts = (*_parts(self), *_parts(other))
        return Steering(self.edits + other.edits, parts[0] if len(parts) == 1 else Card("sum", parts=parts))

    def __radd__(self, other: object) -> Steering:
        """So that `sum(steerings)` works: it starts from 0."""
        return self if other == 0 else NotImplemented

    def __sub__(self, other: Steering) -> Steering:
        return self + -other

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Steering:
        """A steering from a file, trimtab's or another program's: `trimtab.load`."""
        return above("files.load", "load")(path, **options)

    @classmethod
    def from_pretrained(cls, repository: str | Path, **options: Any) -> Steering:
        """A steering from the Hugging Face Hub, or a folder: `trimtab.from_pretrained`."""
        return above("files.hub", "from_pretrained")(repository, **options)

    def save(self, path: str | Path) -> str:
        """Write it to a `.safetensors` file: `trimtab.save`. Returns the digest."""
        return above("files.steering_file", "save_steering")(self, path)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Put it on the Hugging Face Hub, with a page made from its card: `trimtab.push_to_hub`."""
        return above("files.hub", "push_to_hub")(self, repository, **options)

    def at(self, positions: Positions) -> Steering:
        """The same edits at other positions."""
        return replace(self, edits=tuple(replace(edit, positions=positions) for edit in self.edits))

    def when(self, gate: Gate) -> Steering:
        """The same edits, only on requests for which `gate` is open as well."""
        return replace(self, edits=tuple(replace(edit, gate=edit.gate & gate) for edit in self.edits))

    def only(self, layers: Iterable[int]) -> Steering:
        """The edits at these layers. Raises `TrimtabError` when it has none at one of them."""
        wanted = list(layers)
        if missing := sorted(set(wanted) - set(self.layers)):
            raise TrimtabError(f"this steering has nothing at layer {missing[0]}; it has layers {_list(self.layers)}")
        return replace(self, edits=tuple(edit for edit in self.edits if edit.site.layer in wanted))

    def at_layer(self, layer: int) -> Steering:
        """The same edits at another layer. Raises `TrimtabError` for a steering that acts at several, or at none."""
        if len(self.layers) != 1:
            raise TrimtabError(f"only what acts at one layer can act at another; this acts at {_list(self.layers)}")
        return replace(self, edits=tuple(replace(edit, site=replace(edit.site, layer=layer)) for edit in self.edits))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers at which it acts, in order."""
        return tuple(sorted({edit.site.layer for edit in self.edits}))

    def __getitem__(self, layer: int) -> Steering:
        """The edits at one layer, as a steering. Raises `TrimtabError` where it has none there."""
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TrimtabError(
                f"steering[14] has what acts at layer 14, got {layer!r}; for several, steering.only([…])"
            )
        return self.only([layer])

    __iter__ = None  # the old way to iterate, by `steering[0]` and so on, would fail at the first layer without an edit

    def direction(self, layer: int) -> Tensor:
        """The unit direction in which it steers at a layer: `[width]`, float32.

        What is added with a negative strength is turned round. How long the push is, `plot` and the table of a
        notebook show.

        Raises:
            TrimtabError: It has nothing at this layer, several edits, or an edit that has no direction.
        """
        return directions(self[layer])[layer].float()

    def cosine(self, other: Steering) -> dict[int, float]:
        """The cosine between both directions at each layer at which both act, by layer.

        Raises:
            TrimtabError: `other` is no steering, or they don't share a layer, or its site or width; or one has several
                edits at a layer, or one without a direction.
        """
        if not isinstance(other, Steering):
            raise TrimtabError(f"a steering is compared with another steering, got {type(other).__name__}")
        return shared_cosines(self, other)

    def plot(self, ax: Any = None) -> Any:
        """Draw how hard it pushes at each layer into matplotlib's `ax`, or a new one, which is returned.

        The bars are norms of the push: in norms of the activation, where the card has these.

        Raises:
            TrimtabError: matplotlib is missing, or there is no direction to show.
        """
        return above("report.axes", "draw_steering")(self, ax)

    def _repr_html_(self) -> str:
        return str(above("report.notebook", "steering_html")(self))

    def __repr__(self) -> str:
        if len(self.edits) > 4:
            inner = f"{self.edits[0]}, … {len(self.edits) - 1} more"
        else:
            inner = ", ".join(str(edit) for edit in self.edits)
        return f"Steering({self.card.method}: {inner or 'nothing'})"


def _parts(steering: Steering) -> tuple[Card, ...]:
    if steering.card.method == "sum":
        return steering.card.parts
    return (steering.card,) if steering.edits or steering.card != Card() else ()


def _list(layers: Iterable[int]) -> str:
    return ", ".join(str(layer) for layer in layers) or "none"


def check_strength(value: float) -> float:
    """The strength as a float. Raises `TrimtabError` for NaN, an infinity or no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TrimtabError(f"a strength is a finite number, got {value!r}")
    return float(value)
