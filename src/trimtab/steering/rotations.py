"""Rotations in a plane, of an activation and a direction or of two directions: the norm and what is off it stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.operations import SHORTEST, WRITING, Directed, Kernel
from trimtab.steering.projections import PARALLEL, Rows, along
from trimtab.steering.tensors import as_direction, as_unit

NEARLY = 64
"""An activation within so many roundings of the direction's line has no plane to turn in."""


def rotated(
    x: Tensor,
    u: Tensor,
    norm: Tensor,
    turned: Callable[[Tensor], Tensor],
    ceiling: Tensor | float,
    out: Tensor | None = None,
) -> Tensor:
    """`x` `[..., width]`, of this norm, turned in its plane with the unit direction `u`.

    `turned` gives the new angle to the plane through the origin that u is normal to, `[..., 1]`, for the one that x has
    (its sign is that of x.u). In closed form, x' = |x| (sin t u + cos t (x - c u) / q) with c = u.x, q = |x - c u|, and
    t the new angle for the old one, atan2(c, q). The published form divides by the sine of twice that, which fails near
    the plane. Activations whose projection isn't below `ceiling` stay; so does one along u, which has no plane to turn
    in.
    """
    c = along(x, u)
    rest = torch.addcmul(x, c, u, value=-1)
    rest = torch.addcmul(rest, along(rest, u), u, value=-1)  # again: near u the first time leaves rounding along it
    q = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
    parts = torch.polar(norm, turned(torch.atan2(c, q)))
    new = torch.addcmul(rest * (parts.real / q), parts.imag, u)
    plane = q > NEARLY * torch.finfo(x.dtype).eps * norm
    return torch.where(plane & (c < ceiling), new, x, out=out)


def rotate(x: Tensor, rows: Rows, out: Tensor | None = None) -> Tensor:
    """`x` turned towards `direction` by `angle`, after its angle to the plane was multiplied by `lean`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)

    def turned(old: Tensor) -> Tensor:
        return torch.addcmul(rows["angle"], rows["lean"], old)

    return rotated(x, rows["direction"], norm, turned, rows["ceiling"], out)


WRITING.add(rotate)


@dataclass(frozen=True, eq=False, repr=False)
class Rotate(Directed, name="rotate"):
    """Turns activations towards a unit direction `[width]`, keeping their norm (HPR, 2409.10053).

    The turn is `strength * angle` (radians), in the plane of the activation and the direction. `angle=None` is the
    Householder reflection on the plane that the direction is normal to: at strength 1 the projection changes its sign,
    at 1/2 it becomes 0. With `one_sided` only activations with a negative projection are turned.
    """

    angle: float | None = None
    one_sided: bool = field(default=True, kw_only=True)

    kernel = staticmethod(rotate)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_unit(self.direction))
        object.__setattr__(self, "angle", _angle(self.angle))
        if not isinstance(self.one_sided, bool):
            raise TrimtabError(f"one_sided is true or false, got {self.one_sided!r}")

    def row(self, strength: float) -> dict[str, Tensor]:
        one = self.direction.new_ones(1)
        return {
            "direction": self.direction,
            "angle": one * (strength * (self.angle or 0.0)),
            "lean": one * (1 - 2 * strength if self.angle is None else 1.0),
            "ceiling": one * (0.0 if self.one_sided else math.inf),
        }


def rotate_in_plane(x: Tensor, rows: Rows, out: Tensor | None = None) -> Tensor:
    """`x` `[..., width]` turned in the plane of the orthonormal rows `first` and `other`.

    The turn is `angle + share * d`, d being the angle, from -pi to pi, from x's part in the plane to the direction that
    lies `target` beyond `first`.
    """
    first, other = rows["first"], rows["other"]
    a, b = along(x, first), along(x, other)
    d = rows["target"] - torch.atan2(b, a)
    t = rows["angle"] + rows["share"] * torch.atan2(torch.sin(d), torch.cos(d))
    cos, sin = torch.cos(t), torch.sin(t)
    new = torch.addcmul(x, cos * a - sin * b - a, first)
    return torch.addcmul(new, sin * a + cos * b - b, other, out=out)


WRITING.add(rotate_in_plane)


@dataclass(frozen=True, eq=False, repr=False)
class RotateInPlane(Directed, name="rotate_in_plane"):
    """Turns what activations have in a fixed plane, that of two unit directions `[width]`; the rest stays as it is.

    The turn is `strength * angle` (radians; positive: from `direction` towards `second`). With `angle=None` it is a
    share of the way: `strength` times each activation's own angle to `second`, so that at strength 1 its part in the
    plane points along `second` (Angular Steering, 2510.26243, turns to such a target).

    Raises:
        TrimtabError: Directions that aren't of norm 1, differ in width, or are (nearly) parallel and span no plane.
    """

    second: Tensor
    angle: float | None = None

    kernel = staticmethod(rotate_in_plane)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_unit(self.direction))
        object.__setattr__(self, "second", as_unit(self.second, "second direction"))
        object.__setattr__(self, "angle", _angle(self.angle))
        if self.second.shape != self.direction.shape:
            raise TrimtabError(
                f"the two directions of a plane have one width, got {self.width} and {self.second.shape[0]}"
            )
        if abs(float(self.direction.double() @ self.second.double())) > PARALLEL:
            raise TrimtabError("the two directions are (nearly) parallel, and span no plane; take another second one")

    def row(self, strength: float) -> dict[str, Tensor]:
        first, second = self.direction.double(), self.second.double()
        first = first / first.norm()
        other = second - (second @ first) * first
        other = other / other.norm()
        one = first.new_ones(1)
        return {
            "first": first,
            "other": other,
            "target": one * math.atan2(float(second @ other), float(second @ first)),
            "angle": one * (strength * (self.angle or 0.0)),
            "share": one * (strength if self.angle is None else 0.0),
        }


def _angle(value: float | None) -> float | None:
    if value is None:
        return None
    if not math.isfinite(float(value)):
        raise TrimtabError(f"an angle is a finite number of radians, got {float(value)}")
    return float(value)


def angle_sizes(width: int) -> list[int]:
    """The layer sizes of the network that predicts angles: d, d/2, d/4, d/8, 1."""
    return [width, *(max(1, width // part) for part in (2, 4, 8)), 1]


def weight_count(width: int) -> int:
    """How many weights that network has."""
    sizes = angle_sizes(width)
    return sum(a * b + b for a, b in pairwise(sizes))


def predicted_angle(x: Tensor, weights: Tensor) -> Tensor:
    """The network's angle for activations `[..., width]`, 0 … pi: `[..., 1]`.

    It sees activations scaled to a mean square of 1, so that, as an angle should, its own doesn't depend on their size.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return math.pi * _share_of_pi(x, norm.clamp_min(SHORTEST), weights)


def _share_of_pi(x: Tensor, norm: Tensor, weights: Tensor) -> Tensor:
    """The network's angle for activations of this norm, in units of pi; NaN where that is 0."""
    width = x.shape[-1]
    (weight, bias), *parts = _layers(weights, width)
    z = torch.addmm(bias, (x / norm).reshape(-1, width), weight.T, alpha=math.sqrt(width))
    for weight, bias in parts:
        z = torch.nn.functional.linear(torch.nn.functional.gelu(z), weight, bias)
    return torch.sigmoid(z).view(*x.shape[:-1], 1)


def _layers(weights: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    sizes = angle_sizes(width)
    start = 0
    for a, b in pairwise(sizes):
        yield weights[start : start + a * b].view(b, a), weights[start + a * b : start + a * b + b]
        start += a * b + b


@dataclass(frozen=True, eq=False, repr=False)
class RotatePredicted(Directed, name="rotate_predicted"):
    """As a one-sided `Rotate`, by an angle that a small network predicts from the activation (HPR).

    `weights` are the network's, one layer after the other (weight `[out, in]`, then bias), in one vector. The turn is
    `strength` times the predicted angle.
    """

    weights: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_unit(self.direction))
        object.__setattr__(self, "weights", as_direction(self.weights, "vector of the angle network's weights"))
        if len(self.weights) != weight_count(self.width):
            raise TrimtabError(
                f"an angle network for width {self.width} has {weight_count(self.width)} weights, got"
                f" {len(self.weights)}"
            )

    @cached_property
    def kernel(self) -> Kernel:
        """Bound to the network, which is too large for a row: each such operation runs in a call of its own."""
        copies: dict[Any, Tensor] = {}

        def rotate_predicted(x: Tensor, rows: Rows, out: Tensor | None = None) -> Tensor:
            key = (x.device, x.dtype)
            if key not in copies:
                copies[key] = self.weights.to(device=x.device, dtype=x.dtype)
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            share = _share_of_pi(x, norm, copies[key])

            def turned(old: Tensor) -> Tensor:
                return torch.addcmul(old, rows["strength"], share, value=math.pi)

            return rotated(x, rows["direction"], norm, turned, 0.0, out)

        WRITING.add(rotate_predicted)
        return rotate_predicted

    def row(self, strength: float) -> dict[str, Tensor]:
        return {"direction": self.direction, "strength": self.direction.new_full((1,), strength)}
