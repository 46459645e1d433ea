"""On which requests an edit acts: a condition on the prompt's own, unsteered activations.

A gate is decided once per request, from the activations at the last prompt token, before anything is
steered. Gates combine with `&`, `|` and `~`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from trimtab.steering.site import Site
from trimtab.steering.tensors import as_direction, same

Readings = Mapping[Site, Tensor]
MEASURES = ("dot", "cosine")


class Gate:
    """A condition. `is_open` answers it from `readings`, a `[width]` activation for each of `sites`."""

    @property
    def sites(self) -> frozenset[Site]:
        """The sites whose activations the condition reads; none: it is decided without reading."""
        return frozenset()

    def is_open(self, readings: Readings) -> bool:
        raise NotImplementedError

    def __and__(self, other: Gate) -> Gate:
        return other if self == Always() else self if other == Always() else AllOf((self, other))

    def __or__(self, other: Gate) -> Gate:
        return AnyOf((self, other))

    def __invert__(self) -> Gate:
        return Not(self)


@dataclass(frozen=True)
class Always(Gate):
    """Open for every request."""

    def __str__(self) -> str:
        return "always"

    def is_open(self, readings: Readings) -> bool:
        return True


ALWAYS = Always()


@dataclass(frozen=True, eq=False)
class Threshold(Gate):
    """Open when `measure` of the prompt's activation and `direction` exceeds `threshold`.

    `measure="dot"` is the dot product, in units of the residual stream times the direction's norm;
    `"cosine"` lies in -1 … 1 (CAST, 2409.05907, section 3). The direction is `[width]`.
    """

    site: Site
    direction: Tensor
    threshold: float
    measure: str = "dot"

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"unknown measure {self.measure!r}; known: {', '.join(MEASURES)}")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise ValueError(f"a threshold is a number, got {self.threshold!r}")
        if not math.isfinite(self.threshold):
            raise ValueError(f"a threshold is finite, got {self.threshold!r}")
        object.__setattr__(self, "direction", as_direction(self.direction, "gate direction"))

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset({self.site})

    def __str__(self) -> str:
        return f"{self.measure} at {self.site} > {self.threshold:g}"

    def is_open(self, readings: Readings) -> bool:
        x = readings[self.site].to(device="cpu").double()
        v = self.direction.double()
        value = float(x @ v)
        if self.measure == "cosine":
            value /= float(x.norm() * v.norm()) or 1.0
        return value > self.threshold

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Threshold):
            return NotImplemented
        mine, others = (self.site, self.threshold, self.measure), (other.site, other.threshold, other.measure)
        return mine == others and same(self.direction, other.direction)

    def __hash__(self) -> int:
        return hash((self.site, self.threshold, self.measure, self.direction.numpy().tobytes()))


@dataclass(frozen=True)
class Not(Gate):
    """Open when `gate` is shut."""

    gate: Gate

    def __str__(self) -> str:
        return f"not ({self.gate})"

    @property
    def sites(self) -> frozenset[Site]:
        return self.gate.sites

    def is_open(self, readings: Readings) -> bool:
        return not self.gate.is_open(readings)


@dataclass(frozen=True)
class _Many(Gate):
    gates: tuple[Gate, ...]

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset().union(*(gate.sites for gate in self.gates))


class AllOf(_Many):
    """Open when every one of `gates` is."""

    def __str__(self) -> str:
        return " and ".join(f"({gate})" for gate in self.gates)

    def is_open(self, readings: Readings) -> bool:
        return all(gate.is_open(readings) for gate in self.gates)


class AnyOf(_Many):
    """Open when one of `gates` is."""

    def __str__(self) -> str:
        return " or ".join(f"({gate})" for gate in self.gates)

    def is_open(self, readings: Readings) -> bool:
        return any(gate.is_open(readings) for gate in self.gates)
