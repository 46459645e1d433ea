"""Rotations in a plane, spanned by the activation and a direction or by two directions. They preserve the norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.operations import ACCEPTS_OUT, SHORTEST, Directed, Kernel
from trimtab.steering.projections import PARALLEL, Rows, projection, projection_gap, set_projections
from trimtab.steering.tensors import as_direction, as_unit

NEARLY = 64
"""An activation within this many machine epsilons of the direction's line spans no plane with it."""
CLOSE = 4096
"""The same for `rotate_by_fixed_angle`, which orthogonalizes only once and so has larger rounding errors."""


def rotate_by_map(
    x: Tensor,
    u: Tensor,
    norm: Tensor,
    new_angle: Callable[[Tensor], Tensor],
    ceiling: Tensor | float,
    out: Tensor | None = None,
) -> Tensor:
    """`x` `[..., width]`, with norm `norm`, rotated in the plane that it spans with the unit direction `u`.

    The angle of x is measured from the hyperplane through the origin that is orthogonal to u, with the sign of x.u.
    `new_angle` maps the old angle, atan2(c, q), to the new one t, `[..., 1]`. In closed form,
    x' = |x| (sin t u + cos t (x - c u) / q) with c = u.x and q = |x - c u|. The published form divides by the sine of
    twice the old angle, which fails near the hyperplane. Activations whose projection isn't below `ceiling` don't
    change, and neither do those along u, which span no plane with it.
    """
    c = projection(x, u)
    rest = torch.addcmul(x, c, u, value=-1)
    rest = torch.addcmul(rest, projection(rest, u), u, value=-1)  # again, since rounding errors remain near u
    q = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
    parts = torch.polar(norm, new_angle(torch.atan2(c, q)))
    new = torch.addcmul(rest * (parts.real / q), parts.imag, u)
    plane = q > NEARLY * torch.finfo(x.dtype).eps * norm
    return torch.where(plane & (c < ceiling), new, x, out=out)


def rotate(x: Tensor, rows: Rows, out: Tensor | None = None) -> Tensor:
    """`x` rotated so that its angle to the hyperplane of `direction` becomes `angle + lean * old angle`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)

    def new_angle(old: Tensor) -> Tensor:
        return torch.addcmul(rows["angle"], rows["lean"], old)

    return rotate_by_map(x, rows["direction"], norm, new_angle, rows["ceiling"], out)


ACCEPTS_OUT.add(rotate)


def slope_terms(x: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The component r of x orthogonal to the direction u, its norm q, `-x.u`, and s = q / -x.u, positive if x.u < 0.

    `shift`, slightly below 0, is added to -x.u so that an activation with x.u = 0 counts as being on the positive side.
    """
    c = projection_gap(rows["shift"], x, rows["direction"])
    rest = torch.addcmul(x, c, rows["direction"])
    q = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
    return rest, q, c, q / c


def rotate_by_fixed_angle(x: Tensor, rows: Rows, out: Tensor | None = None) -> Tensor:
    """`x` rotated towards `direction` by a fixed angle if its projection is negative; few kernels, no trigonometry.

    For the angle a, x' = x + (cos a - 1 + sin a / s) r + (sin a - (cos a - 1) / s) q u, with r, q and s of
    `slope_terms`. `turn` is `(cos a - 1, sin a)`, `cross` is `(sin a, 1 - cos a)`.
    """
    rest, q, _, slope = slope_terms(x, rows)
    shares = torch.addcdiv(rows["turn"], rows["cross"], slope)
    shares.masked_fill_(slope <= CLOSE * torch.finfo(x.dtype).eps, 0)
    new = torch.addcmul(x, shares[..., :1], rest)
    return torch.addcmul(new, shares[..., 1:] * q, rows["direction"], out=out)


ACCEPTS_OUT.add(rotate_by_fixed_angle)


@dataclass(frozen=True, eq=False, repr=False)
class Rotate(Directed, name="rotate"):
    """Rotates activations towards a unit direction `[width]`, keeping their norm (HPR, 2409.10053).

    The rotation is by `strength * angle` (radians), in the plane spanned by the activation and the direction.
    `angle=None` is the Householder reflection on the hyperplane orthogonal to the direction: strength 1 flips the sign
    of the projection, and strength 0.5 makes it 0. With `one_sided`, only activations with a negative projection are
    rotated. An activation (nearly) along the direction spans no plane with it and doesn't change, except by the full
    reflection (strength 1), which needs no plane.
    """

    angle: float | None = None
    one_sided: bool = field(default=True, kw_only=True)

    kernel: ClassVar[Any] = staticmethod(rotate)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_unit(self.direction))
        object.__setattr__(self, "angle", _angle(self.angle))
        if not isinstance(self.one_sided, bool):
            raise TrimtabError(f"one_sided is true or false, got {self.one_sided!r}")

    def row(self, strength: float) -> dict[str, Tensor]:
        ones = self.direction.new_ones(1)
        return {
            "direction": self.direction,
            "angle": ones * (strength * (self.angle or 0.0)),
            "lean": ones * (1 - 2 * strength if self.angle is None else 1.0),
            "ceiling": ones * (0.0 if self.one_sided else math.inf),
        }

    def call(self, strength: float) -> tuple[Kernel, Rows]:
        """Cheaper kernels for the full reflection, which is linear, and for a one-sided rotation by a fixed angle."""
        u, ones = self.direction, self.direction.new_ones(1)
        if self.angle is None and strength == 1:
            floor = {"floor.0": 0 * ones} if self.one_sided else {}
            return set_projections, {"direction.0": u, "weight.0": 2 * u, "target.0": 0 * ones, **floor}
        if self.angle is None or not self.one_sided:
            return self.kernel, self.row(strength)
        cosine_less_one, sine = _cosine_less_one(strength * self.angle), math.sin(strength * self.angle)
        return rotate_by_fixed_angle, {
            "direction": u,
            "shift": -SHORTEST * ones,
            "turn": u.new_tensor([cosine_less_one, sine]),
            "cross": u.new_tensor([sine, -cosine_less_one]),
        }


def rotate_in_plane(x: Tensor, rows: Rows, out: Tensor | None = None) -> Tensor:
    """`x` `[..., width]` rotated in the plane of the orthonormal rows `first` and `other`.

    The rotation is by `angle + share * d`, where d is the angle, from -pi to pi, from x's projection on the plane to
    the direction at the angle `target` from `first`.
    """
    first, other = rows["first"], rows["other"]
    a, b = projection(x, first), projection(x, other)
    d = rows["target"] - torch.atan2(b, a)
    t = rows["angle"] + rows["share"] * torch.atan2(torch.sin(d), torch.cos(d))
    cos, sin = torch.cos(t), torch.sin(t)
    new = torch.addcmul(x, cos * a - sin * b - a, first)
    return torch.addcmul(new, sin * a + cos * b - b, other, out=out)


ACCEPTS_OUT.add(rotate_in_plane)


@dataclass(frozen=True, eq=False, repr=False)
class RotateInPlane(Directed, name="rotate_in_plane"):
    """Rotates activations in the fixed plane of two unit directions `[width]`; the orthogonal component doesn't change.

    The rotation is by `strength * angle` (radians; positive: from `direction` towards `second`). With `angle=None` it
    is by `strength` times each activation's own angle to `second`, so that at strength 1 the component in the plane
    points along `second` (Angular Steering, 2510.26243, rotates to such a target).

    Raises:
        TrimtabError: The directions don't have norm 1, differ in width, or are (nearly) parallel and span no plane.
    """

    second: Tensor
    angle: float | None = None

    kernel: ClassVar[Any] = staticmethod(rotate_in_plane)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_unit(self.direction))
        object.__setattr__(self, "second", as_unit(self.second, "second direction"))
        object.__setattr__(self, "angle", _angle(self.angle))
        if self.second.shape != self.direction.shape:
            raise TrimtabError(
                f"the two directions of a plane have the same width, got {self.width} and {self.second.shape[0]}"
            )
        if abs(float(self.direction.double() @ self.second.double())) > PARALLEL:
            raise TrimtabError(
                "the two directions are (nearly) parallel, so they don't span a plane; choose a different second one"
            )

    def row(self, strength: float) -> dict[str, Tensor]:
        first, second = self.direction.double(), self.second.double()
        first = first / first.norm()
        other = second - (second @ first) * first
        other = other / other.norm()
        ones = first.new_ones(1)
        return {
            "first": first,
            "other": other,
            "target": ones * math.atan2(float(second @ other), float(second @ first)),
            "angle": ones * (strength * (self.angle or 0.0)),
            "share": ones * (strength if self.angle is None else 0.0),
        }

    def call(self, strength: float) -> tuple[Kernel, Rows]:
        """A cheaper kernel for a rotation by a fixed angle, which is linear in the two projections."""
        if self.angle is None:
            return self.kernel, self.row(strength)
        row, zero = self.row(strength), self.direction.new_zeros(1)
        first, other = row["first"].double(), row["other"].double()
        cosine_less_one, sine = _cosine_less_one(strength * self.angle), math.sin(strength * self.angle)
        return set_projections, {
            "direction.0": row["first"],
            "weight.0": -(cosine_less_one * first + sine * other),
            "target.0": zero,
            "direction.1": row["other"],
            "weight.1": -(cosine_less_one * other - sine * first),
            "target.1": zero,
        }


def _cosine_less_one(angle: float) -> float:
    """cos(angle) - 1, accurate for small angles too."""
    return -2 * math.sin(angle / 2) ** 2


def _angle(value: float | None) -> float | None:
    if value is None:
        return None
    try:
        angle = float(value)
    except (TypeError, ValueError):
        angle = math.nan
    if not math.isfinite(angle):
        raise TrimtabError(f"an angle is a finite number of radians, got {value!r}")
    if abs(angle) > 2 * math.pi:
        raise TrimtabError(
            f"an angle is in radians (a full turn is 6.28), got {angle:g}; write math.radians({angle:g})"
        )
    return angle


def angle_sizes(width: int) -> list[int]:
    """The layer sizes of the network that predicts angles: d, d/2, d/4, d/8, 1."""
    return [width, *(max(1, width // part) for part in (2, 4, 8)), 1]


def weight_count(width: int) -> int:
    """The number of weights of that network."""
    sizes = angle_sizes(width)
    return sum(a * b + b for a, b in pairwise(sizes))


def predicted_angle(x: Tensor, weights: Tensor) -> Tensor:
    """The angle, 0 … pi, that the network predicts for activations `[..., width]`: `[..., 1]`.

    Its inputs are RMS-normalized, so that the predicted angle doesn't depend on the norm of the activation.
    """
    *layers, (weight, bias) = _layers(weights, x.shape[-1])
    last = torch.nn.functional.linear(_hidden(x, layers), weight, bias)
    return math.pi * torch.sigmoid(last).view(*x.shape[:-1], 1)


def _hidden(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The input of the network's last layer for activations `[..., width]`: `[tokens, width / 8]`."""
    z = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=float(torch.finfo(x.dtype).tiny)).reshape(-1, x.shape[-1])
    for weight, bias in layers:
        z = torch.nn.functional.gelu(torch.nn.functional.linear(z, weight, bias))
    return z


def _layers(weights: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    sizes = angle_sizes(width)
    start = 0
    for a, b in pairwise(sizes):
        yield weights[start : start + a * b].view(b, a), weights[start + a * b : start + a * b + b]
        start += a * b + b


@dataclass(frozen=True, eq=False, repr=False)
class RotatePredicted(Directed, name="rotate_predicted"):
    """A one-sided `Rotate` by an angle that a small network predicts from the activation (HPR).

    `weights` are the network's weights in one vector, layer by layer (weight `[out, in]`, then bias). The rotation is
    by `strength` times the predicted angle.
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
        """A kernel bound to the network, which is too large for a row: each such operation runs in a separate call.

        The network's last layer outputs the scaled strength as well, so that one gated linear unit gives the angle.
        """
        copies: dict[Any, list[tuple[Tensor, Tensor]]] = {}

        def rotate_predicted(x: Tensor, rows: Rows, out: Tensor | None = None) -> Tensor:
            key = (x.device, x.dtype)
            if key not in copies:
                copies[key] = list(_layers(self.weights.to(device=x.device, dtype=x.dtype), self.width))
                weight, bias = copies[key].pop()
                copies[key].append((torch.cat([torch.zeros_like(weight), weight]), bias))
            *layers, (weight, _) = copies[key]
            both = torch.addmm(rows["last"].reshape(-1, 2), _hidden(x, layers), weight.T)
            angle = torch.nn.functional.glu(both).view(*x.shape[:-1], 1)
            rest, q, _, slope = slope_terms(x, rows)
            # x' = Re z r + Im z q u with z = exp(i a) (1 - i / s)
            z = torch.polar(rows["one"], angle)
            z = torch.addcdiv(z, z, slope, value=-1j)
            new = torch.addcmul(rest * z.real, z.imag * q, rows["direction"])
            return torch.where(slope > CLOSE * torch.finfo(x.dtype).eps, new, x, out=out)

        ACCEPTS_OUT.add(rotate_predicted)
        return rotate_predicted

    def row(self, strength: float) -> dict[str, Tensor]:
        ones = self.direction.new_ones(1)
        return {
            "direction": self.direction,
            "shift": -SHORTEST * ones,
            "one": ones,
            "last": torch.cat([math.pi * strength * ones, self.weights[-1:].to(ones.dtype)]),
        }
