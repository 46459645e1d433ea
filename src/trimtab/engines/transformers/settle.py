"""Edits whose operation is decided by the request's own prompt: read it, unsteered, and put the decided one in.

Such an operation has `settled(activations)`, which gives the operation for a prompt's activations `[tokens, width]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.read import Text, read_groups
from trimtab.steering import Edit, Site

TOKENS_PER_BATCH = 1024
"""All tokens of all such sites are held at a time, which is much where they are neurons."""

Read = Callable[[Sequence[int], Sequence[Site]], dict[int, dict[Site, Tensor]]]


def settle(requests: Sequence[tuple[Edit, ...]], read: Read) -> list[tuple[Edit, ...]]:
    """The requests' edits, with the operations that their prompts decide.

    `read(numbers, sites)` gives for each of these requests the activations `[prompt tokens, width]` at the sites; it
    isn't called where nothing is to be decided.
    """
    sites = [sorted({edit.site for edit in edits if is_open(edit)}) for edits in requests]
    numbers = [i for i, wanted in enumerate(sites) if wanted]
    if not numbers:
        return list(requests)
    found = read(numbers, sorted({site for wanted in sites for site in wanted}))
    return [
        tuple(
            replace(edit, operation=edit.operation.settled(found[i][edit.site])) if is_open(edit) else edit
            for edit in edits
        )
        for i, edits in enumerate(requests)
    ]


def read_prompts(layout: Layout, prompts: Sequence[Sequence[int]]) -> Read:
    """Reads prompts, given by their token ids, by passes of their own."""

    def read(numbers: Sequence[int], sites: Sequence[Site]) -> dict[int, dict[Site, Tensor]]:
        groups = [[Text(prompts[i], range(len(prompts[i])))] for i in numbers]
        found: dict[int, dict[Site, Tensor]] = {}
        for batch in read_groups(layout, groups, sites, tokens_per_batch=TOKENS_PER_BATCH):
            for n, g in enumerate(batch.groups):
                found[numbers[g]] = {site: batch.values[site][n][0] for site in sites}
        return found

    return read


def is_open(edit: Edit) -> bool:
    """Whether the request's prompt decides the edit's operation."""
    return hasattr(edit.operation, "settled")
