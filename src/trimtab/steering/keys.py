"""Emphasis by keys: what multiplies the keys of a span multiplies its scores, and no score has to be computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.keywords import class_keywords, keywords
from trimtab.steering.attention import ScaleScores
from trimtab.steering.elements import multiply_up
from trimtab.steering.operations import NEUTRAL, TOGETHER, Operation
from trimtab.steering.projections import Rows
from trimtab.steering.site import Site
from trimtab.steering.steering import Steering


def scale_all(x: Tensor, rows: Rows) -> Tensor:
    """`x * factor`, for `x` `[..., width]` and `factor` `[..., 1]`."""
    return x * rows["factor"]


def multiply_all(rows: Sequence[Rows], names: Sequence[object]) -> Rows:
    """The factors of several rows as one. Raises `TrimtabError` where that leaves what a float32 holds."""
    made = multiply_up(rows, names)
    if not 0 < float(made["factor"]) < 1e30:
        raise TrimtabError(
            f"{' + '.join(map(str, names))}: they scale keys by {float(made['factor']):g}; lower their strengths"
        )
    return made


TOGETHER[scale_all] = multiply_all
NEUTRAL[scale_all] = 1.0


@class_keywords
@dataclass(frozen=True, eq=False, repr=False)
class ScaleKeys(Operation, name="scale_keys"):
    """`x' = alpha^strength * x`, for the keys `x` of a span, in every head, as attention stores them.

    Every query's scores with these keys are multiplied as `ScaleScores` multiplies them, but by the model's own
    attention, of any kind; a decoded token costs nothing more. It fits keys of any width, at the site `"keys"`.
    """

    alpha: float = 100.0

    kernel = staticmethod(scale_all)
    only_at: ClassVar[str] = "keys"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alpha", ScaleScores(self.alpha).alpha)
        if self.keep_norm:
            raise TrimtabError("keys that are scaled don't keep their norm; leave keep_norm out")

    def factor(self, strength: float) -> float:
        """What a key is multiplied by. Raises `TrimtabError` when that leaves what a float32 holds."""
        return ScaleScores(self.alpha).factor(strength)

    def row(self, strength: float) -> dict[str, Tensor]:
        return {"factor": torch.tensor([self.factor(strength)], dtype=torch.float64)}

    @property
    def width(self) -> int:
        """0: any."""
        return 0

    @property
    def norm(self) -> float:
        return self.alpha

    def __repr__(self) -> str:
        return f"ScaleKeys(alpha={self.alpha!r})"


@keywords
def by_keys(steering: Steering) -> Steering:
    """The same steering with keys scaled instead of scores: `ScaleKeys` for each `ScaleScores`.

    Both give the same up to rounding; other edits stay as they are.
    """
    return replace(steering, edits=tuple(_by_keys(edit) for edit in steering.edits))


def _by_keys(edit: Any) -> Any:
    if not isinstance(edit.operation, ScaleScores):
        return edit
    return replace(edit, site=Site(edit.site.layer, "keys"), operation=ScaleKeys(edit.operation.alpha))
