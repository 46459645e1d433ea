"""Emphasis by scaled keys: scaling a span's keys scales its attention scores, without access to the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.keywords import class_keywords, keywords
from trimtab.steering.attention import ScaleScores
from trimtab.steering.elements import multiply_factors
from trimtab.steering.operations import MERGE_ROWS, NEUTRAL, Operation
from trimtab.steering.projections import Rows
from trimtab.steering.site import Site
from trimtab.steering.steering import Steering


def scale_by_scalar(x: Tensor, rows: Rows) -> Tensor:
    """`x * factor`, for `x` `[..., width]` and `factor` `[..., 1]`."""
    return x * rows["factor"]


def multiply_scalars(rows: Sequence[Rows], names: Sequence[object]) -> Rows:
    """The product of several rows' factors. Raises `TrimtabError` if it is outside the range of float32."""
    made = multiply_factors(rows, names)
    if not 0 < float(made["factor"]) < 1e30:
        raise TrimtabError(
            f"{' + '.join(map(str, names))}: they scale keys by {float(made['factor']):g}; lower their strengths"
        )
    return made


MERGE_ROWS[scale_by_scalar] = multiply_scalars
NEUTRAL[scale_by_scalar] = 1.0


@class_keywords
@dataclass(frozen=True, eq=False, repr=False)
class ScaleKeys(Operation, name="scale_keys"):
    """`x' = alpha^strength * x`, for the keys `x` of a span as stored in the KV cache, in every head.

    Every query's scores with these keys are scaled as by `ScaleScores`. But the model's own attention computes them,
    so any attention implementation works and decode steps cost nothing extra. It acts at the site `"keys"`, on keys
    of any width.
    """

    alpha: float = 100.0

    kernel = staticmethod(scale_by_scalar)
    only_at: ClassVar[str] = "keys"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alpha", ScaleScores(self.alpha).alpha)
        if self.keep_norm:
            raise TrimtabError("keys that are scaled don't keep their norm; leave keep_norm out")

    def factor(self, strength: float) -> float:
        """The factor for keys at this strength. Raises `TrimtabError` if it is outside the range of float32."""
        return ScaleScores(self.alpha).factor(strength)

    def row(self, strength: float) -> dict[str, Tensor]:
        return {"factor": torch.tensor([self.factor(strength)], dtype=torch.float64)}

    @property
    def width(self) -> int:
        """0, which means any width."""
        return 0

    @property
    def norm(self) -> float:
        return self.alpha

    def __repr__(self) -> str:
        return f"ScaleKeys(alpha={self.alpha!r})"


@keywords
def by_keys(steering: Steering) -> Steering:
    """Replace each `ScaleScores` of a steering by `ScaleKeys`, so that keys are scaled instead of scores.

    Both have the same effect up to rounding. Other edits don't change.

    Args:
        steering: The steering, such as of `directer`.

    Returns:
        The steering with scaled keys.
    """
    return replace(steering, edits=tuple(_by_keys(edit) for edit in steering.edits))


def _by_keys(edit: Any) -> Any:
    if not isinstance(edit.operation, ScaleScores):
        return edit
    return replace(edit, site=Site(edit.site.layer, "keys"), operation=ScaleKeys(edit.operation.alpha))
