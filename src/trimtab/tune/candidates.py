"""The candidates of a search: one learned steering at many layers, strengths and positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab.errors import TrimtabError
from trimtab.steering import Positions, Steering
from trimtab.steering.steering import check_strength

LAYERS = 8
"""The approximate number of layers that `default_layers` returns."""

STRENGTHS = (0.5, 1.0, 1.5)
"""Multiples of the learned steering: of the mean difference if added, of the way to the target if projected."""


@dataclass(frozen=True)
class Setting:
    """A layer (block, from 0), a strength (multiple of the learned steering), a position rule, and an operation."""

    layer: int
    strength: float
    positions: str
    operation: str

    def __str__(self) -> str:
        return f"{self.operation} at block {self.layer}, strength {self.strength:g}, {self.positions}"


@dataclass(frozen=True)
class Candidate:
    """A setting, and its steering."""

    setting: Setting
    steering: Steering


def default_layers(count: int) -> list[int]:
    """The layers worth trying in a model with `count` layers: from a fifth of the depth on (Stolfo et al., appendix).

    About `LAYERS` of them, evenly spaced.
    """
    return list(range(count // 5, count, max(1, round((count - count // 5) / LAYERS))))


def grid(
    learned: Mapping[str, Steering],
    strengths: Sequence[float] | Mapping[str, Sequence[float]] = STRENGTHS,
    positions: Sequence[Positions] | None = None,
) -> list[Candidate]:
    """Every layer × strength × positions of every learned steering.

    `learned` maps the names of operations (`"add"`, `"project"`) to steerings, each with one or more edits at each
    layer to try, as returned by `learn_instruct(lm, pairs, layers)` for several layers. `strengths` are multiples of
    them, for all or by name. `positions` replace the learned ones; `None` keeps those.

    Raises `TrimtabError` if there is nothing to try, or a strength is 0 (no steering is always tried) or not finite.
    """
    candidates = []
    for name, steering in learned.items():
        for strength in strengths[name] if isinstance(strengths, Mapping) else strengths:
            if check_strength(strength) == 0:
                raise TrimtabError("strength 0 doesn't steer, and not steering is always tried; leave it out")
            for rule in [None] if positions is None else positions:
                for layer in steering.layers:
                    scaled = strength * steering.only([layer])
                    scaled = scaled if rule is None else scaled.at(rule)
                    where = str(scaled.edits[0].positions)
                    candidates.append(Candidate(Setting(layer, float(strength), where, name), scaled))
    if not candidates:
        raise TrimtabError("there is nothing to try: no steering, no layer, no strength or no positions")
    return candidates
