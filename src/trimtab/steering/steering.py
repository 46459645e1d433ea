"""Edits and steerings. A steering is an ordered tuple of edits that can be scaled, added, saved and applied."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.keywords import class_keywords
from trimtab.steering.attention import SCORE_NAMES, ScoreOperation
from trimtab.steering.attributes import STEERING_HINTS, raise_missing_attribute
from trimtab.steering.card import Card
from trimtab.steering.cosines import Cosines
from trimtab.steering.directions import directions, shared_cosines
from trimtab.steering.gates import ALWAYS, Gate
from trimtab.steering.integers import as_int
from trimtab.steering.operations import NAMES, Operation
from trimtab.steering.positions import NAMED, Positions
from trimtab.steering.site import Site


@class_keywords
@dataclass(frozen=True)
class Edit:
    """One operation at one site and at some positions, with a strength and a gate.

    Args:
        site: The place in the network.
        operation: The change, such as `Add(direction)`.
        positions: The tokens at which it acts.
        strength: Defined by the operation: a multiple of the direction for `Add`, a share of the way to the target for
            `SetProjection` and `Ablate`. 0 has no effect.
        gate: The condition on the prompt, or on each token, under which it acts.
    """

    site: Site
    operation: Any  # an Operation, or a ScoreOperation if the site is attention scores
    positions: Positions = NAMED["from-last-prompt-token"]
    strength: float = 1.0
    gate: Gate = ALWAYS

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", check_strength(self.strength))
        if not isinstance(self.site, Site):
            site = self.site if isinstance(self.site, int) else 14
            raise TrimtabError(f"an edit's site is a Site, got {self.site!r}; write Site({site})")
        if not isinstance(self.operation, (Operation, ScoreOperation)):
            raise TrimtabError(
                f"an edit's operation is an Operation such as Add(direction), got {_kind(self.operation)}; write"
                " Add(direction)"
            )
        if not isinstance(self.positions, Positions):
            raise TrimtabError(_no_positions(self.positions))
        if not isinstance(self.gate, Gate):
            raise TrimtabError(f"an edit's gate is a Gate such as Threshold(…), got {self.gate!r}")
        if isinstance(self.operation, ScoreOperation) != (self.site.kind == "scores"):
            raise TrimtabError(f"{type(self.operation).__name__} can't act at {self.site}")
        only = getattr(self.operation, "only_at", self.site.kind)
        if only != self.site.kind:
            raise TrimtabError(
                f"{type(self.operation).__name__} acts at {only}, not at {self.site}; write"
                f" Site({self.site.layer}, {only!r})"
            )

    def __str__(self) -> str:
        gate = "" if self.gate == ALWAYS else f" when {self.gate}"
        operation = getattr(self.operation, "operation", self.operation)  # unwrap a Conditional
        name = SCORE_NAMES[type(operation)] if isinstance(operation, ScoreOperation) else NAMES[type(operation)]
        return f"{self.strength:g} * {name} @ {self.site} {self.positions}{gate}"


@class_keywords
@dataclass(frozen=True)
class Steering:
    """Edits, in the order in which they act, and a card with their provenance.

    Multiplication and negation act on every edit's strength. A sum has the edits of both steerings, in order. Two
    steerings are equal if their edits are equal; the cards aren't compared.

    Examples:
        >>> import torch
        >>> from trimtab import Add
        >>> kind = Steering((Edit(Site(12), Add(torch.ones(4))),))
        >>> brief = Steering((Edit(Site(14), Add(torch.ones(4)), strength=0.5),))
        >>> for edit in (2 * kind - brief).edits:
        ...     print(edit)
        2 * add @ residual[12] from-last-prompt-token
        -0.5 * add @ residual[14] from-last-prompt-token
        >>> (kind + brief).layers
        (12, 14)
        >>> -(-kind) == kind
        True
    """

    edits: tuple[Edit, ...] = ()
    card: Card = field(default=Card(), compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.edits, list):
            object.__setattr__(self, "edits", tuple(self.edits))
        if not isinstance(self.edits, tuple) or not all(isinstance(edit, Edit) for edit in self.edits):
            raise TrimtabError(f"a steering is made of edits, Steering((edit, …)), got {_kind(self.edits)}")

    def __mul__(self, factor: float) -> Steering:
        factor = check_strength(factor)
        return replace(self, edits=tuple(replace(edit, strength=edit.strength * factor) for edit in self.edits))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Steering:
        if check_strength(divisor) == 0:
            raise TrimtabError("a steering can't be divided by 0")
        return self * (1 / divisor)

    def __neg__(self) -> Steering:
        return self * -1.0

    def __add__(self, other: Steering) -> Steering:
        _check_summand(other)
        parts = (*_summand_cards(self), *_summand_cards(other))
        return Steering(self.edits + other.edits, parts[0] if len(parts) == 1 else Card("sum", parts=parts))

    def __radd__(self, other: object) -> Steering:
        """Makes `sum(steerings)` work, which starts from 0."""
        return self if other == 0 else NotImplemented

    def __sub__(self, other: Steering) -> Steering:
        _check_summand(other)
        return self + -other

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Steering:
        """Load a steering from a file of trimtab or of another program: the same as `trimtab.load`."""
        from trimtab.files.load import load

        return load(path, **options)

    @classmethod
    def from_pretrained(cls, repository: str | Path, **options: Any) -> Steering:
        """Load a steering from the Hugging Face Hub or from a folder: the same as `trimtab.from_pretrained`."""
        from trimtab.files.hub import from_pretrained

        return from_pretrained(repository, **options)

    def save(self, path: str | Path) -> str:
        """Write it to a `.safetensors` file and return the digest: the same as `trimtab.save`."""
        from trimtab.files.steering_file import save_steering

        return save_steering(self, path)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload it to the Hugging Face Hub, with a page made from its card: the same as `trimtab.push_to_hub`."""
        from trimtab.files.hub import push_to_hub

        return push_to_hub(self, repository, **options)

    def at(self, positions: Positions) -> Steering:
        """The same edits at other positions. Raises `TrimtabError` for anything but `Positions`."""
        if not isinstance(positions, Positions):
            raise TrimtabError(_no_positions(positions))
        return replace(self, edits=tuple(replace(edit, positions=positions) for edit in self.edits))

    def when(self, gate: Gate) -> Steering:
        """The same edits, only for requests for which `gate` is open too. Raises `TrimtabError` for anything else."""
        if not isinstance(gate, Gate):
            raise TrimtabError(f"a steering acts when a Gate such as Threshold(…) is open, got {gate!r}")
        return replace(self, edits=tuple(replace(edit, gate=edit.gate & gate) for edit in self.edits))

    def only(self, layers: int | Iterable[int]) -> Steering:
        """The edits at these layers, or at this one. Raises `TrimtabError` if a layer has no edit."""
        wanted: list[Any]
        if (number := as_int(layers)) is not None:
            wanted = [number]
        elif isinstance(layers, Iterable) and not isinstance(layers, str):
            wanted = list(layers)
        else:
            raise TrimtabError(
                f"steering.only takes layers, 14 or [12, 14] or range(10, 15), got {layers!r}; those with an edit are"
                f" {_list(self.layers)}"
            )
        if absent := [layer for layer in wanted if layer not in self.layers]:
            raise TrimtabError(f"this steering has nothing at layer {absent[0]}; it has layers {_list(self.layers)}")
        return replace(self, edits=tuple(edit for edit in self.edits if edit.site.layer in wanted))

    def at_layer(self, layer: int) -> Steering:
        """The same edits at another layer. Raises `TrimtabError` if the steering acts at several layers or at none."""
        if len(self.layers) != 1:
            raise TrimtabError(
                f"only a steering that acts at one layer can be moved to another; this one acts at {_list(self.layers)}"
            )
        return replace(self, edits=tuple(replace(edit, site=replace(edit.site, layer=layer)) for edit in self.edits))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers at which it acts, in ascending order."""
        return tuple(sorted({edit.site.layer for edit in self.edits}))

    def __getitem__(self, layer: int) -> Steering:
        """The edits at one layer, as a steering. Raises `TrimtabError` if there are none."""
        number = as_int(layer)
        if number is None:
            start, stop = (layer.start or 0, layer.stop) if isinstance(layer, slice) else (12, None)
            several = "[12, 14]" if stop is None else f"range({start}, {stop})"
            raise TrimtabError(
                f"steering[14] selects the edits at layer 14, got {layer!r}; for several layers use"
                f" steering.only({several})"
            )
        return self.only([number])

    __iter__ = None  # otherwise Python would iterate by `steering[0]` and so on, and fail at a layer without an edit

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return raise_missing_attribute(self, "a steering", name, STEERING_HINTS)

    def direction(self, layer: int) -> Tensor:
        """The unit direction in which it steers at a layer: `[width]`, float32.

        The direction of an `Add` with a negative strength is negated. `plot` and the table in a notebook show the
        norms.

        Raises:
            TrimtabError: The layer has no edit, several edits, or an edit without a direction.
        """
        return directions(self[layer])[layer].float()

    def cosine(self, other: Steering) -> Cosines:
        """The cosine between the directions of two steerings, for each layer at which both act.

        Args:
            other: The other steering, learned by any method on the same model.

        Returns:
            `{layer: cosine}`; a notebook displays it as a table, and it has `plot()` and `to_pandas()`.

        Raises:
            TrimtabError: `other` isn't a steering; they share no layer, or differ in site or width at one; or a layer
                has several edits or an edit without a direction.
        """
        if not isinstance(other, Steering):
            raise TrimtabError(f"a steering is compared with another steering, got {type(other).__name__}")
        return shared_cosines(self, other)

    def plot(self, ax: Any = None) -> Any:
        """Plot the norm of the edit at each layer.

        The bars are relative norms if the card has the norms of the activations, else absolute norms.

        Args:
            ax: The matplotlib axes to draw into; by default new ones.

        Returns:
            The axes.

        Raises:
            TrimtabError: matplotlib is missing, or there is no direction to show.
        """
        from trimtab.report.axes import draw_steering

        return draw_steering(self, ax)

    def to_pandas(self) -> Any:
        """A data frame with one row per edit: where it acts, what it does, its strength and its norm.

        Returns:
            A data frame. `norm`, `share` (the relative norm) and `agreement` are missing where the edit has no
            direction or the card has no measurement.

        Raises:
            TrimtabError: pandas is missing.
        """
        from trimtab.report.described import edit_rows
        from trimtab.report.frames import frame

        return frame(edit_rows(self))

    def _repr_html_(self) -> str:
        from trimtab.report.notebook import steering_html

        return str(steering_html(self))

    def __repr__(self) -> str:
        if len(self.edits) > 4:
            inner = f"{self.edits[0]}, … {len(self.edits) - 1} more"
        else:
            inner = ", ".join(str(edit) for edit in self.edits)
        return f"Steering({self.card.method}: {inner or 'nothing'})"


def check_steering(value: Any) -> None:
    """Raise `TrimtabError` unless `value` is a steering. The message says how to make one from what it is."""
    if isinstance(value, Steering):
        return
    if isinstance(value, Edit):
        raise TrimtabError("a steering was expected, got an Edit; write Steering((edit,))")
    if hasattr(value, "__array__"):
        raise TrimtabError(
            f"a steering was expected, got {_kind(value)}; a direction is added at a layer by"
            " Steering((Edit(Site(layer), Add(direction)),))"
        )
    if isinstance(value, (int, float)):
        raise TrimtabError(f"a steering was expected, got {value!r}; a strength multiplies the steering: 2 * steering")
    if isinstance(value, (str, Path)):
        raise TrimtabError(f"{str(value)!r} isn't a steering; trimtab.load(…) reads one from a file")
    raise TrimtabError(f"a steering was expected, got {_kind(value)}")


def _kind(value: Any) -> str:
    if value is None or isinstance(value, (int, float)):
        return repr(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeio' else 'a'} {name}"


def _check_summand(other: Any) -> None:
    if not isinstance(other, Steering):
        raise TrimtabError(
            f"only a steering can be added to a steering, got {_kind(other)}; 2 * steering doubles its strength"
        )


def _no_positions(value: Any) -> str:
    fix = f"Positions.parse({value!r})" if isinstance(value, str) else "Positions.all(), say"
    return f"positions must be a Positions object, got {value!r}; write {fix}"


def _summand_cards(steering: Steering) -> tuple[Card, ...]:
    if steering.card.method == "sum":
        return steering.card.parts
    return (steering.card,) if steering.edits or steering.card != Card() else ()


def _list(layers: Iterable[int]) -> str:
    return ", ".join(str(layer) for layer in layers) or "none"


def check_strength(value: Any) -> float:
    """The strength as a float. Raises `TrimtabError` if it is NaN, infinite or not a number."""
    if isinstance(value, Tensor) and not value.dim():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise TrimtabError(f"a strength is a finite number, got {value!r}")
    return float(value)
