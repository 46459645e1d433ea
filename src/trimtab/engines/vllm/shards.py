"""Sites whose activations are split over tensor-parallel workers: each worker has some of the heads, or neurons.

Elementwise operations, additions and scales, are done by each worker on its part. Operations on the whole activation,
such as projections, are refused before a request runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trimtab.engines.vllm.program import IdentifiedEdit
from trimtab.steering import Add, Edit, ScaleElements, ScaleKeys, Site

BY_ELEMENT = (Add, ScaleElements, ScaleKeys)


def splits(edit: Edit) -> bool:
    """Whether each worker can apply its part of an edit."""
    operation: Any = edit.operation
    return type(operation) in BY_ELEMENT and not operation.keep_norm and not edit.gate.token_sites


@dataclass(frozen=True)
class Shard:
    """The part of split activations that a worker has: number `rank` of `workers`.

    Args:
        split: The kinds of sites that are split, and the width of the whole activation.
        own: The width of a worker's part, if it isn't 1 / `workers` of the whole: if there are fewer key heads than
            workers, several workers have the same head.
    """

    split: Mapping[str, int] = field(default_factory=dict)
    workers: int = 1
    rank: int = 0
    own: Mapping[str, int] = field(default_factory=dict)

    def whole(self, site: Site, width: int) -> int:
        """The width of the whole activation at a site where this worker has `width`."""
        return self.split.get(site.kind, width)

    def of(self, identified: IdentifiedEdit) -> IdentifiedEdit:
        """This worker's part of an edit. Raises `ValueError` for an edit that can't be split."""
        whole = self.split.get(identified.edit.site.kind)
        if whole is None:
            return identified
        if not splits(identified.edit):
            raise ValueError(f"{identified.edit} can't be split over workers")
        if isinstance(identified.edit.operation, ScaleKeys):
            return identified
        size = self.own.get(identified.edit.site.kind, whole // self.workers)
        first = self.rank * (whole // size) // self.workers * size
        own = identified.edit.operation.direction[first : first + size]
        part = replace(identified.edit, operation=replace(identified.edit.operation, direction=own))
        return IdentifiedEdit(f"{identified.name}/{self.rank}", part)


WHOLE = Shard()
"""Nothing is split."""
