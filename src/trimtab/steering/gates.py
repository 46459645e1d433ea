"""Gates: conditions on activations that decide for which requests, or at which tokens, an edit acts.

A gate is decided once per request, from the prompt's unsteered activations (at the last token, in a span, or their
mean over several tokens), before any edit acts. A condition with `each_token` is decided at every token instead, from
the activation that the edit is applied to. Gates of both kinds combine with `&`, `|` and `~`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.keywords import class_keywords
from trimtab.steering.positions import NAMED, Positions
from trimtab.steering.site import Site
from trimtab.steering.tensors import as_direction, check_finite, tensors_equal, to_float64

MEASURES = ("dot", "cosine", "ratio", "cast", "probability")
POOLS = ("mean", "unit-mean")
LAST = NAMED["last-prompt-token"]


def measure_of(x: Tensor, direction: Tensor, measure: str, bias: Tensor | float = 0.0) -> Tensor:
    """The `measure` of activations `x` and a direction, both `[..., width]`: `[...]`. See `Threshold`."""
    along = (x * direction).sum(-1)
    if measure == "dot":
        return along
    if measure == "probability":
        return torch.sigmoid(along + bias)
    if measure == "cast":
        # cos(x, tanh((c.x) c)) of section 3, with a unit direction c
        c = direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True).clamp_min(1e-300)
        direction = torch.tanh((x * c).sum(-1, keepdim=True) * c)
        along = (x * direction).sum(-1)
    norms = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(direction, dim=-1)
    cosine = along / torch.where(norms > 0, norms, torch.ones_like(norms))
    return cosine.abs() if measure == "ratio" else cosine


@dataclass(frozen=True)
class Reading:
    """The input of a gate: the activations at `site` and at `positions` of the prompt, pooled into one `[width]`.

    `pool="mean"` is their mean. `"unit-mean"` is the mean of the activations scaled to norm 1, so that tokens with
    outsized activations (the first one, in most models) count no more than others. For a single token, `"mean"` is
    its activation.
    """

    site: Site
    positions: Positions = LAST
    pool: str = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.site, Site):
            raise TrimtabError(f"a gate reads at a Site, got {self.site!r}; write Site(14)")
        if not isinstance(self.positions, Positions):
            raise TrimtabError(f"a gate reads at Positions, got {self.positions!r}; write Positions.parse('prompt')")
        if self.pool not in POOLS:
            raise ValueError(f"unknown pooling {self.pool!r}; known: {', '.join(POOLS)}")
        if self.positions.meanings:
            raise TrimtabError(f"a gate reads the prompt, but positions {self.positions} refer to generated tokens")

    def tokens(self, prompt_length: int) -> list[int]:
        """The token indices to read in a prompt of this length. Raises `TrimtabError` if there are none."""
        tokens = self.positions.in_prompt(prompt_length)
        if not tokens:
            raise TrimtabError(
                f"a gate reads the prompt at {self.positions}, but a prompt of {prompt_length} tokens has no such"
                " tokens"
            )
        return tokens

    def pooled(self, x: Tensor) -> Tensor:
        """The pooled activation of `[tokens, width]` activations at those positions: `[width]`, float64, on the CPU."""
        x = to_float64(x)
        check_finite(x, self.site)
        if self.pool == "unit-mean":
            x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-300)
        return x[0] if len(x) == 1 else x.mean(0)


Readings = Mapping[Reading, Tensor]


class Gate:
    """A condition on activations. `is_open` evaluates it, given a `[width]` activation for each of its `readings`."""

    @property
    def readings(self) -> frozenset[Reading]:
        """The readings of the prompt that it needs; empty if it needs none or is decided at each token."""
        return frozenset()

    @property
    def token_sites(self) -> frozenset[Site]:
        """The sites of its conditions that are decided at each token."""
        return frozenset()

    @property
    def sites(self) -> frozenset[Site]:
        """All sites whose activations the condition depends on."""
        return frozenset(reading.site for reading in self.readings) | self.token_sites

    def settled(self, readings: Readings) -> Gate:
        """The gate that is left to decide at each token, given the readings; `ALWAYS` or `NEVER` if it is decided."""
        raise NotImplementedError

    def is_open(self, readings: Readings) -> bool:
        """Whether it is open, given the readings. Raises `ValueError` for a gate that is decided at each token."""
        remaining = self.settled(readings)
        if remaining.token_sites:
            raise ValueError(f"{remaining} is decided at each token, not by a prompt")
        return remaining == ALWAYS

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

    def settled(self, readings: Readings) -> Gate:
        return self


ALWAYS = Always()


@class_keywords
@dataclass(frozen=True, eq=False)
class Threshold(Gate):
    """A gate that is open if `measure` of the prompt's activation and `direction` exceeds `threshold`.

    The measures of an activation x and a direction v, both `[width]`:

    - `"dot"`: `x.v`, in units of the residual stream times the direction's norm;
    - `"cosine"`: the cosine of x and v, -1 … 1;
    - `"ratio"`: its absolute value, 0 … 1: the share of x's norm that is along v or against it;
    - `"cast"`: the cosine of x and `tanh((c.x) c)` for the unit direction c (CAST, 2409.05907, section 3). It doesn't
      depend on the sign of v, and it depends on the norm of x;
    - `"probability"`: a logistic probe, `sigmoid(x.v + bias)`.

    x is the activation at `positions` of the prompt, pooled (see `Reading`). With `each_token`, the prompt isn't read:
    the condition is decided at every token from the activation there, at the site at which the edit acts.
    """

    site: Site
    direction: Tensor
    threshold: float
    measure: str = "dot"
    positions: Positions = field(default=LAST, kw_only=True)
    pool: str = field(default="mean", kw_only=True)
    bias: float = field(default=0.0, kw_only=True)
    each_token: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"unknown measure {self.measure!r}; known: {', '.join(MEASURES)}")
        for name in ("threshold", "bias"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and not value.dim():
                value = value.item()
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ValueError(f"a {name} is a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"a {name} is finite, got {value!r}")
            if not isinstance(getattr(self, name), (int, float)):  # numpy's or a tensor's
                object.__setattr__(self, name, float(value))
        if self.bias and self.measure != "probability":
            raise ValueError(f"only a probability has a bias, not a {self.measure}")
        if not isinstance(self.each_token, bool):
            raise ValueError(f"each_token is true or false, got {self.each_token!r}")
        if self.each_token and (self.positions != LAST or self.pool != "mean"):
            raise ValueError("a condition on each token reads that token: it has no positions and no pooling")
        object.__setattr__(self, "direction", as_direction(self.direction, "gate direction"))
        Reading(self.site, self.positions, self.pool)

    def __repr__(self) -> str:
        # Show the direction's shape instead of its numbers, as for operations.
        rest = f"{self.threshold:.6g}, measure={self.measure!r}, positions={self.positions!r}, pool={self.pool!r}"
        return f"Threshold({self.site!r}, direction=[{self.direction.numel()}], threshold={rest})"

    @property
    def reading(self) -> Reading:
        """The reading of the prompt that it needs."""
        return Reading(self.site, self.positions, self.pool)

    @property
    def readings(self) -> frozenset[Reading]:
        return frozenset() if self.each_token else frozenset({self.reading})

    @property
    def token_sites(self) -> frozenset[Site]:
        return frozenset({self.site}) if self.each_token else frozenset()

    def __str__(self) -> str:
        at = " at each token" if self.each_token else ""
        if not self.each_token and (self.positions != LAST or self.pool != "mean"):
            at = f" ({self.pool} over {self.positions})"
        return f"{self.measure} at {self.site}{at} > {self.threshold:g}"

    def value(self, x: Tensor) -> float:
        """The measure of a pooled activation `[width]`."""
        return float(measure_of(to_float64(x), self.direction.double(), self.measure, self.bias))

    def settled(self, readings: Readings) -> Gate:
        if self.each_token:
            return self
        return ALWAYS if self.value(readings[self.reading]) > self.threshold else NEVER

    def _numbers(self) -> tuple:
        return (self.site, self.threshold, self.measure, self.positions, self.pool, self.bias, self.each_token)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Threshold):
            return NotImplemented
        return self._numbers() == other._numbers() and tensors_equal(self.direction, other.direction)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Computed once, as for operations."""
        return hash((*self._numbers(), self.direction.numpy().tobytes()))

    def __getstate__(self) -> dict[str, Any]:
        """The fields without the hash, which is only valid in this process."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Not(Gate):
    """Open if `gate` is closed."""

    gate: Gate

    def __str__(self) -> str:
        return f"not ({self.gate})"

    @property
    def readings(self) -> frozenset[Reading]:
        return self.gate.readings

    @property
    def token_sites(self) -> frozenset[Site]:
        return self.gate.token_sites

    def settled(self, readings: Readings) -> Gate:
        remaining = self.gate.settled(readings)
        return NEVER if remaining == ALWAYS else ALWAYS if remaining == NEVER else Not(remaining)


NEVER = Not(ALWAYS)


@dataclass(frozen=True)
class _Many(Gate):
    gates: tuple[Gate, ...]

    @property
    def readings(self) -> frozenset[Reading]:
        return frozenset().union(*(gate.readings for gate in self.gates))

    @property
    def token_sites(self) -> frozenset[Site]:
        return frozenset().union(*(gate.token_sites for gate in self.gates))

    def _remaining_gate(self, readings: Readings, decisive: Gate, neutral: Gate) -> Gate:
        remaining = tuple(gate.settled(readings) for gate in self.gates)
        if decisive in remaining:
            return decisive
        undecided = tuple(gate for gate in remaining if gate != neutral)
        return neutral if not undecided else undecided[0] if len(undecided) == 1 else type(self)(undecided)


class AllOf(_Many):
    """Open if all `gates` are open."""

    def __str__(self) -> str:
        return " and ".join(f"({gate})" for gate in self.gates)

    def settled(self, readings: Readings) -> Gate:
        return self._remaining_gate(readings, NEVER, ALWAYS)


class AnyOf(_Many):
    """Open if at least one of `gates` is open."""

    def __str__(self) -> str:
        return " or ".join(f"({gate})" for gate in self.gates)

    def settled(self, readings: Readings) -> Gate:
        return self._remaining_gate(readings, ALWAYS, NEVER)


def thresholds(gate: Gate) -> list[Threshold]:
    """The `Threshold` conditions in a gate, in order."""
    if isinstance(gate, Threshold):
        return [gate]
    parts = (gate.gate,) if isinstance(gate, Not) else gate.gates if isinstance(gate, _Many) else ()
    return [threshold for part in parts for threshold in thresholds(part)]
