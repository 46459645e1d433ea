"""Sites whose activations are split over tensor-parallel workers: each worker has so many of the heads, or neurons.

What is done there element by element, to add or to scale, each worker does to its own. What takes the whole activation,
such as a projection, is refused before a request runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trimtab.engines.vllm.program import Identified
from trimtab.steering import Add, Edit, ScaleElements, ScaleKeys, Site

BY_ELEMENT = (Add, ScaleElements, ScaleKeys)


def splits(edit: Edit) -> bool:
    """Whether each worker can do its part of an edit."""
    operation: Any = edit.operation
    return type(operation) in BY_ELEMENT and not operation.keep_norm and not edit.gate.token_sites


@dataclass(frozen=True)
class Shard:
    """Which part of split activations a worker has: number `rank` of `workers`.

    Args:
        split: The kinds of sites that are split, and the width of the whole activation.
        own: How wide a worker's part is, where it isn't one of as many as there are workers: of fewer heads of keys
            than workers several have the same one.
    """

    split: Mapping[str, int] = field(default_factory=dict)
    workers: int = 1
    rank: int = 0
    own: Mapping[str, int] = field(default_factory=dict)

    def whole(self, site: Site, width: int) -> int:
        """How wide the whole activation is where a worker has this much."""
        return self.split.get(site.kind, width)

    def of(self, identified: Identified) -> Identified:
        """This worker's part of an edit. Raises `ValueError` for one that doesn't split."""
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
        return Identified(f"{identified.name}/{self.rank}", part)


WHOLE = Shard()
"""Nothing is split."""
