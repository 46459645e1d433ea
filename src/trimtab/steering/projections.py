"""Joint setting of projections: the projections of one activation on several directions are moved to their targets.

If projections are set one after the other, they undo each other unless their directions are orthogonal. With unit
directions as the rows of `U` `[k, width]`, `G = U Uᵀ` and the wanted changes `d_i = share_i * (target_i - x.u_i)`, the
smallest step that makes all of them is `x' = x + Uᵀ G⁻¹ d`. The component orthogonal to all directions doesn't change,
and the order of the directions doesn't matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError

Rows = Mapping[str, Any]
"""A kernel's parameters by name, each a tensor or a `LowRank` (see `low_rank`)."""

PARALLEL = 0.9999
"""Two directions whose absolute cosine exceeds this count as the same and can't have two different targets."""
DEPENDENT = 1e-4
"""If the smallest eigenvalue of the directions' Gram matrix is below this, they count as linearly dependent."""
EQUAL = 1e-5


def projection(x: Tensor, u: Tensor) -> Tensor:
    """`x.u`, `[..., 1]`, for `x` and `u` `[..., width]`; in one kernel for decode steps `[rows, 1, width]`."""
    return torch.bmm(x, u.mT) if _single(x, u) else (x * u).sum(-1, keepdim=True)


def projection_gap(target: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """`target - x.u`, `[..., 1]`, computed as in `projection`."""
    return torch.baddbmm(target, x, u.mT, alpha=-1) if _single(x, u) else target - projection(x, u)


def _single(x: Tensor, u: Tensor) -> bool:
    return x.dim() == 3 and x.shape[1] == 1 and x.shape == u.shape and x.dtype == u.dtype


def set_projections(x: Tensor, rows: Rows, out: Tensor | None = None) -> Tensor:
    """`x + sum over i of max(target_i - x.u_i, floor_i) w_i`, with `x`, `u_i`, `w_i` of shape `[..., width]`.

    The rows are `direction.<i>` (`u_i`), `weight.<i>` (`w_i`, a row of `diag(share) G⁻¹ U`), `target.<i>` and, for
    one-sided projections, `floor.<i>` (`[..., 1]`; 0 if one-sided, else minus infinity).
    """
    new, count = x, sum(name.startswith("direction.") for name in rows)
    for i in range(count):
        gap = projection_gap(rows[f"target.{i}"], x, rows[f"direction.{i}"])
        if f"floor.{i}" in rows:
            gap = torch.maximum(gap, rows[f"floor.{i}"])
        new = torch.addcmul(new, gap, rows[f"weight.{i}"], out=out if i == count - 1 else None)
    return new


def solve_projections(rows: Sequence[Rows], names: Sequence[object]) -> dict[str, Tensor]:
    """The rows of `set_projections` for operations that act jointly.

    Each of `rows` has `direction` `[width]`, `target`, `share` and `floor` `[1]`; `names` are for error messages. An
    operation that duplicates another one is left out. Raises `TrimtabError`, with the names, if two operations have
    different targets for (nearly) the same direction, or if the directions are (nearly) linearly dependent.
    """
    distinct = _distinct_rows(rows, names)
    rows, names = [rows[i] for i in distinct], [names[i] for i in distinct]
    u = torch.stack([row["direction"].double() for row in rows])
    gram = u @ u.T
    if len(rows) > 1:
        _check_independent(gram, names)
    # diag(share) G⁻¹ U, so that the kernel only computes target - x.u (G⁻¹ is symmetric)
    weights = torch.linalg.solve(gram, u) * torch.stack([row["share"].double() for row in rows])
    solved: dict[str, Tensor] = {}
    for i, row in enumerate(rows):
        solved[f"direction.{i}"] = row["direction"]
        solved[f"weight.{i}"] = weights[i]
        solved[f"target.{i}"] = row["target"]
        if not math.isinf(float(row["floor"])):
            solved[f"floor.{i}"] = row["floor"]
    return solved


def _distinct_rows(rows: Sequence[Rows], names: Sequence[object]) -> list[int]:
    """The indices of the rows that don't duplicate an earlier one."""
    distinct: list[int] = []
    for i, row in enumerate(rows):
        near = [(j, cosine) for j in distinct if abs(cosine := _cosine(rows[j], row)) > PARALLEL]
        if not near:
            distinct.append(i)
        elif any(not _agree(rows[j], row, 1 if cosine > 0 else -1) for j, cosine in near):
            raise TrimtabError(
                "two edits set the projection on (nearly) the same direction to different targets:"
                f" {names[near[0][0]]} (target {_end(rows[near[0][0]])}) and {names[i]} (target {_end(row)}); use one"
                " of them, or put them at different layers or positions"
            )
    return distinct


def _cosine(a: Rows, b: Rows) -> float:
    return float(torch.cosine_similarity(a["direction"].double(), b["direction"].double(), dim=0))


def _agree(a: Rows, b: Rows, sign: int) -> bool:
    """Whether two operations are equivalent, given that their directions are parallel (`sign` 1) or opposite (-1)."""
    if float((a["direction"].double() - sign * b["direction"].double()).norm()) > EQUAL:
        return False
    one_sided = [not math.isinf(float(row["floor"])) for row in (a, b)]
    if any(one_sided) and (sign < 0 or not all(one_sided)):
        return False
    ends = [(_end(a), sign * _end(b)), (float(a["share"]), float(b["share"]))]
    return all(math.isclose(p, q, rel_tol=EQUAL, abs_tol=EQUAL) for p, q in ends)


def _end(row: Rows) -> float:
    return float(row["target"])


def _check_independent(gram: Tensor, names: Sequence[object]) -> None:
    scale = gram.diagonal().rsqrt()
    values, vectors = torch.linalg.eigh(gram * scale[:, None] * scale)
    if float(values[0]) < DEPENDENT:
        weight = vectors[:, 0].abs()
        dependent = [
            str(name) for name, share in zip(names, weight.tolist(), strict=True) if share > 0.1 * float(weight.max())
        ]
        raise TrimtabError(
            "one of these edits' directions is (nearly) a linear combination of the others, so their projections"
            f" can't be set separately: {'; '.join(dependent)}; leave one out, or put them at different layers or"
            " positions"
        )
