"""Protection of always-on steerings: other steerings lose their components along these directions.

Let V be the span of the directions of all steerings that are always on, whatever their layers: the residual stream
carries what is added at one layer to all later ones, so a push against it at another layer cancels it too. A request's
steerings are changed so that none of their edits changes the stream's projection onto V, at any layer or token:

    Add             v'  =  v - P v                 P the orthogonal projection on V
    SetProjection   u'  =  (u - P u) / |u - P u|
    Ablate          the same

Other operations scale, rotate or clip all or parts of the stream, V included, and are refused. So are edits of heads,
neurons and parts of a block, which reach the stream through weights and norms. Edits of attention scores add nothing
to the stream and stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering import Ablate, Add, Edit, ScaleKeys, SetProjection, Steering

STREAM = ("residual", "block_input")
"""The kinds of sites in the residual stream itself."""
PARTS = ("attention", "mlp")
"""Sites whose output is added to the stream; an always-on steering there has directions in the stream."""
LEAST = 0.05
"""A direction of which less than this share is left is nearly the protected one, and is refused."""


@dataclass(frozen=True)
class Protected:
    """The span of always-on directions: an orthonormal `basis` `[directions, width]`, float64; `None`: there are none.

    `unknown` names always-on steerings without directions to protect: scales, rotations, heads.
    """

    basis: Tensor | None = None
    unknown: tuple[str, ...] = ()

    @property
    def anything(self) -> bool:
        """Whether other steerings are restricted at all."""
        return self.basis is not None or bool(self.unknown)


def protection_of(always: Sequence[tuple[str, Steering]]) -> Protected:
    """The protection for these steerings, given with their names."""
    directions: list[Tensor] = []
    unknown = []
    for name, steering in always:
        for edit in steering.edits:
            if _emphasizes(edit):
                continue
            if edit.site.kind in STREAM + PARTS and type(edit.operation) in (Add, SetProjection, Ablate):
                directions.append(edit.operation.direction.double())
            else:
                unknown.append(name)
    return Protected(_basis(directions), tuple(dict.fromkeys(unknown)))


def remove_protected(protection: Protected, steering: Steering) -> tuple[Steering, float]:
    """The steering without its components along the protected directions, and the largest share that an edit has lost.

    The share is `|P v| / |v|`, from 0 to 1. Raises `TrimtabError` if the components can't be removed.
    """
    if not protection.anything:
        return steering, 0.0
    edits, lost = [], 0.0
    for edit in steering.edits:
        new, share = _remove_protected(protection, edit)
        edits.append(new)
        lost = max(lost, share)
    return replace(steering, edits=tuple(edits)), lost


def _remove_protected(protection: Protected, edit: Edit) -> tuple[Edit, float]:
    if _emphasizes(edit):
        return edit, 0.0
    if protection.unknown:
        raise TrimtabError(
            f"{protection.unknown[0]!r} is always on and isn't made of directions of the residual stream, so it can't"
            " be protected from other steerings: on this server, requests can only steer by emphasis"
        )
    operation = edit.operation
    if edit.site.kind not in STREAM or type(operation) not in (Add, SetProjection, Ablate) or operation.keep_norm:
        raise TrimtabError(
            f"{edit} could undo a steering that is always on here; only edits without keep_norm that add to the"
            " residual stream, or set or ablate a projection of it, are allowed"
        )
    assert protection.basis is not None
    direction = operation.direction.double()
    if direction.shape[-1] != protection.basis.shape[-1]:
        raise TrimtabError(
            f"{edit} has width {direction.shape[-1]}, but the residual stream has {protection.basis.shape[-1]}"
        )
    norm = float(direction.norm())
    along = protection.basis.T @ (protection.basis @ direction)
    if not norm or float(along.norm()) <= 1e-7 * norm:
        return edit, 0.0
    rest = direction - along
    rest = rest - protection.basis.T @ (protection.basis @ rest)  # again, to remove rounding errors
    if float(rest.norm()) < LEAST * norm:
        raise TrimtabError(f"{edit} acts almost only along a steering that is always on here")
    if not isinstance(operation, Add):
        rest = rest / rest.norm()
    return replace(edit, operation=replace(operation, direction=rest.to(operation.direction.dtype))), float(
        along.norm()
    ) / norm


def _emphasizes(edit: Edit) -> bool:
    """Whether it only changes how much a span is attended to, and so adds nothing that could undo anything."""
    return edit.site.kind == "scores" or isinstance(edit.operation, ScaleKeys)


def _basis(directions: Sequence[Tensor]) -> Tensor | None:
    """An orthonormal basis `[rank, width]` of the span of vectors `[width]`; `None` if all are zero."""
    units = [v / v.norm() for v in directions if v.any()]
    if not units:
        return None
    _, values, basis = torch.linalg.svd(torch.stack(units), full_matrices=False)
    return basis[values > 1e-9 * values[0]]
