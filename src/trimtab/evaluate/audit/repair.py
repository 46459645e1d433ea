"""Makes a steering orthogonal to protected directions, such as those of refusal.

Each edit still reads what it read before, but what it writes loses its component along the protected directions: at the
site of the edit, `x' - x` is orthogonal to them for every activation. Later blocks may reintroduce that component, so a
repaired steering is measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.evaluate.audit.direction import STREAM, orthonormal_basis, written_by
from trimtab.steering import Add, Edit, ReadWrite, SetProjection, Site, Steering
from trimtab.steering.scaled import AddScaled

LEAST = 0.05
"""An edit is dropped if less than this share of its length remains."""


@dataclass(frozen=True)
class Repaired:
    """A repaired steering.

    Args:
        steering: The steering, orthogonal to the protected directions.
        remaining_shares: For each edit of the original, the share of its length that remains; 0 if it was dropped.
    """

    steering: Steering
    remaining_shares: tuple[float, ...]


def repair_steering(
    steering: Steering, protected: Callable[[Site], Sequence[Tensor]], what: Sequence[str] = ()
) -> Repaired:
    """Remove the component of a steering along protected directions.

    Args:
        steering: The steering. Its edits have to write into the residual stream, and to add, set or ablate projections,
            or read and write.
        protected: Returns the protected directions, each `[width]`, at a site.
        what: The names of what is protected, for the card.

    Returns:
        The repaired steering.

    Raises:
        UnsupportedError: An edit is of another kind, at another site, or keeps the norm; the message names it.
        TrimtabError: Nothing is left of the steering.
    """
    edits, remaining_shares = [], []
    for edit in steering.edits:
        basis = orthonormal_basis(torch.stack([direction.double() for direction in protected(edit.site)]))
        new, share = _orthogonal(edit, basis)
        kept = new if share >= LEAST else None
        remaining_shares.append(share if kept is not None else 0.0)
        edits += [kept] if kept is not None else []
    if not edits:
        raise TrimtabError(
            f"nothing is left of the steering without {' and '.join(what) or 'what is protected'}: that is all it does,"
            " so there is nothing to repair; leave it out"
        )
    card = steering.card
    options = {**card.options, "orthogonal_to": list(what)}
    cleaned = replace(card, options=options, audit=None, divergence=None)
    return Repaired(replace(steering, edits=tuple(edits), card=cleaned), tuple(remaining_shares))


def _orthogonal(edit: Edit, basis: Tensor) -> tuple[Edit, float]:
    """The edit without that component, and the share of its length that remains."""
    operation = edit.operation
    if edit.site.kind not in STREAM:
        raise UnsupportedError(
            f"{edit}: what is written at {edit.site.kind} goes through a projection first; only edits at"
            f" {', '.join(STREAM)} can be repaired"
        )
    if getattr(operation, "keep_norm", False):
        raise UnsupportedError(
            f"{edit}: it keeps the norm, which rescales components along all directions; learn it without to repair it"
        )
    written = written_by(operation)
    if written is None:
        raise UnsupportedError(
            f"{edit}: only edits that add, set or ablate projections, or read and write, can be repaired"
        )
    rest = written - written @ basis @ basis.T
    norm = float(written.norm())
    share = float(rest.norm()) / norm if norm else 0.0
    if isinstance(operation, Add):
        return replace(edit, operation=Add(rest[0].to(operation.direction.dtype))), share
    if isinstance(operation, AddScaled):
        if operation.by != "norm":
            raise UnsupportedError(f"{edit}: its length depends on its own direction; a repair can't keep that")
        # AddScaled's direction has norm 1, so the shorter length becomes a smaller strength
        unit = (rest[0] / max(share, LEAST)).to(operation.direction.dtype)
        new = AddScaled(unit) if share >= LEAST else operation
        return replace(edit, operation=new, strength=edit.strength * share), share
    if isinstance(operation, ReadWrite):
        new_map = replace(operation, write=rest.to(operation.write.dtype))
        return replace(edit, operation=new_map), share
    # (target - x.u) u becomes (target - x.u) times what is left of u: the same is read, less is written
    one_sided = isinstance(operation, SetProjection) and operation.one_sided
    target = operation.target if isinstance(operation, SetProjection) else 0.0
    made = ReadWrite(
        read=-operation.direction[None],
        write=rest.to(operation.direction.dtype),
        bias=torch.tensor([target], dtype=operation.direction.dtype),
        low=0.0 if one_sided else None,
    )
    return replace(edit, operation=made), share
