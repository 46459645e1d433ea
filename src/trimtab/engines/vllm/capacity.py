"""What the operators of a captured graph can do: fixed when the engine starts, since each step runs the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trimtab.errors import TrimtabError

FEATURES = ("scales", "norms", "gates", "reads")


@dataclass(frozen=True)
class Capacity:
    """What captured graphs can do after blocks, besides adding.

    Args:
        rank: The maximum number of rows of a low-rank map (a projection is one row); 0: only additions.
        steps: The maximum number of consecutive edits that can't be folded into one map.
        scales: Whether elements can be scaled.
        norms: Whether norms can be kept, and additions measured in norms.
        gates: Whether there can be conditions on each token.
        reads: Whether activations can be read (by gates on the prompt, and by `capture`).
        layers: The blocks after which more than addition is possible; `None`: all.
    """

    rank: int = 0
    steps: int = 1
    scales: bool = False
    norms: bool = False
    gates: bool = False
    reads: bool = False
    layers: tuple[int, ...] | None = None

    @property
    def maps(self) -> bool:
        """Whether more than addition is possible anywhere."""
        return self.rank > 0 or self.scales

    def at(self, layer: int) -> bool:
        """Whether more than addition is possible after this block."""
        return self.maps and (self.layers is None or layer in self.layers)

    def __or__(self, other: Capacity) -> Capacity:
        """The smallest capacity that can do what either can."""
        layers = None
        if not self.maps or not other.maps:
            layers = self.layers if self.maps else other.layers
        elif self.layers is not None and other.layers is not None:
            layers = tuple(sorted({*self.layers, *other.layers}))
        flags = {name: getattr(self, name) or getattr(other, name) for name in FEATURES}
        return Capacity(max(self.rank, other.rank), max(self.steps, other.steps), layers=layers, **flags)

    def to_plain(self) -> dict[str, Any]:
        """The capacity as JSON-compatible data."""
        plain = {name: getattr(self, name) for name in ("rank", "steps", *FEATURES)}
        return {**plain, "layers": None if self.layers is None else list(self.layers)}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Capacity:
        """The inverse of `to_plain`."""
        layers = data["layers"]
        return cls(**{**data, "layers": None if layers is None else tuple(layers)})


ADDITIONS = Capacity()
"""Only additions."""

KERNELS = {
    "additions": ADDITIONS,
    "projections": Capacity(rank=4),
    "all": Capacity(rank=4, scales=True, norms=True, gates=True, reads=True),
}
"""The capacities that `$TRIMTAB_KERNEL` can name."""


def capacity_from(environment: Mapping[str, str]) -> Capacity | None:
    """The capacity that an environment sets; `None` if it sets none.

    Args:
        environment: `TRIMTAB_KERNEL`, one of `KERNELS`, refined by `TRIMTAB_RANK`, `TRIMTAB_STEPS`, and
            `TRIMTAB_LAYERS` (`10-14,20`).

    Raises:
        TrimtabError: One of the variables can't be parsed.
    """
    names = ("TRIMTAB_KERNEL", "TRIMTAB_RANK", "TRIMTAB_STEPS", "TRIMTAB_LAYERS")
    kernel, rank, steps, layers = (environment.get(name) for name in names)
    if kernel is None and rank is None and steps is None and layers is None:
        return None
    capacity = KERNELS.get(kernel or "all")
    if capacity is None:
        raise TrimtabError(f"TRIMTAB_KERNEL is one of {', '.join(KERNELS)}, got {kernel!r}")
    for name, value in (("rank", rank), ("steps", steps)):
        if value is None:
            continue
        if not value.isdecimal() or int(value) < 1:
            raise TrimtabError(f"TRIMTAB_{name.upper()} is a whole number from 1 up, got {value!r}")
        capacity = replace(capacity, rank=int(value)) if name == "rank" else replace(capacity, steps=int(value))
    return capacity if layers is None else replace(capacity, layers=_layers(layers))


def _layers(text: str) -> tuple[int, ...]:
    layers: set[int] = set()
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        if not low.isdecimal() or not (high or low).isdecimal() or int(high or low) < int(low):
            raise TrimtabError(f"TRIMTAB_LAYERS names layers such as 10-14,20, got {text!r}")
        layers.update(range(int(low), int(high or low) + 1))
    return tuple(sorted(layers))


def union(several: Iterable[Capacity]) -> Capacity:
    """The smallest capacity that can do what any of these can."""
    total = ADDITIONS
    for capacity in several:
        total = total | capacity
    return total
