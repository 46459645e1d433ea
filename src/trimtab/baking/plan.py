"""Plan how a steering changes the weights that write to the residual stream; reject what can't be baked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.baking.affine import Affine, is_orthogonal
from trimtab.baking.structure import ATTENTION, ELSEWHERE, EMBEDDINGS, MLP, Structure
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Ablate, Add, Always, Edit, Positions, Site, Steering

KINDS = ("residual", "block_input", "attention", "mlp")
FIRST = Site(0, EMBEDDINGS)


@dataclass(frozen=True)
class Plan:
    """The changes to a model.

    `maps` are by the site that the weights write to, `flags` are configuration fields to set to true, and `biases` are
    the names of the biases that those flags create.
    """

    maps: dict[Site, Affine]
    flags: dict[str, bool]
    biases: frozenset[str]


def check_bakeable(steering: Steering) -> tuple[Edit, ...]:
    """The steering's edits that do something.

    Raises:
        TrimtabError: There is none.
        UnsupportedError: An edit depends on the request or the token, or does something that weights can't do.
    """
    edits = tuple(edit for edit in steering.edits if edit.strength != 0)
    if not edits:
        raise TrimtabError("the steering does nothing (no edits, or all of strength 0), so there is nothing to bake")
    for edit in edits:
        operation = edit.operation
        if type(operation) not in (Add, Ablate):
            raise UnsupportedError(f"weights can add and ablate directions, and nothing else; this steering has {edit}")
        if operation.keep_norm:
            raise UnsupportedError(f"weights can't keep the activation's norm, as this steering asks: {edit}")
        if not isinstance(edit.gate, Always):
            raise UnsupportedError(f"weights are the same for every request, and this steering has a gate: {edit}")
        if edit.positions != Positions.all():
            raise UnsupportedError(
                f"weights act at every token of prompt and answer, and this steering acts at {edit.positions}: {edit};"
                " if that is what you want, use steering.at(Positions.all()), or --positions all on the command line"
            )
        if edit.site.kind not in KINDS:
            raise UnsupportedError(f"only {', '.join(KINDS)} can be baked into weights, and this steering has {edit}")
    return edits


def plan(steering: Steering, structure: Structure) -> Plan:
    """The changes that bake a steering into a model.

    Args:
        steering: The steering to bake.
        structure: The model.

    Raises:
        TrimtabError: The steering doesn't fit the model, or does nothing.
        UnsupportedError: No change to the model's weights does what one of the edits does.
    """
    edits = check_bakeable(steering)
    for edit in edits:
        if edit.site.layer >= structure.layers:
            raise TrimtabError(
                f"the steering acts at layer {edit.site.layer}; this model has layers 0 to {structure.layers - 1}"
            )
        if edit.operation.width != structure.width:
            raise TrimtabError(f"the steering's width is {edit.operation.width}, this model's is {structure.width}")
    maps = {
        site: Affine.of([edit for edit in edits if edit.site == site], structure.width)
        for site in sorted({edit.site for edit in edits if edit.site.kind in (ATTENTION, MLP)} | {FIRST})
    }
    if maps[FIRST].adds:
        raise UnsupportedError(
            f"{structure.name}'s embeddings have no bias, so an addition at {FIRST} can't be stored in its weights;"
            f" {ELSEWHERE}"
        )
    added: list[Tensor] = []
    for layer in range(structure.layers):
        behind = [e for e in edits if e.site in (Site(layer), Site(layer + 1, "block_input"))]
        behind.sort(key=lambda edit: edit.site.kind == "block_input")  # which comes after the block's output
        if not behind:
            continue
        for edit in behind:
            if isinstance(edit.operation, Ablate):
                _check_needless(edit, layer, maps, added, structure)
        offset = _offset(behind, structure.width)
        if offset.any():
            if structure.not_plain_reason is not None:
                raise UnsupportedError(
                    f"{structure.name} {structure.not_plain_reason}, so an addition at {behind[0].site} can't be"
                    f" stored as a bias; {ELSEWHERE}"
                )
            site = Site(layer, MLP)
            maps[site] = maps.get(site, Affine(structure.width)).then_add(offset)
            added.append(offset)
    maps = {site: site_map for site, site_map in maps.items() if site_map.steps}
    flags, biases = structure.bias_flags([site for site, site_map in maps.items() if site_map.adds])
    return Plan(maps, flags, biases)


def _offset(edits: Sequence[Edit], width: int) -> Tensor:
    """The output of these edits for zeros: first those at a block's output, then those at the next block's input."""
    offset = torch.zeros(width, dtype=torch.float64)
    for site in dict.fromkeys(edit.site for edit in edits):
        offset = Affine.of([edit for edit in edits if edit.site == site], width).apply(offset)
    return offset


def _check_needless(
    edit: Edit, layer: int, maps: dict[Site, Affine], added: Sequence[Tensor], structure: Structure
) -> None:
    """Raise `UnsupportedError` unless the ablated direction never enters the stream before this edit.

    If it never does, the edit has no effect, and the weights don't have to represent it.
    """
    direction = edit.operation.direction
    before = [FIRST, *(Site(i, kind) for i in range(layer + 1) for kind in (ATTENTION, MLP))]
    cleared = all(site in maps and _removes(maps[site], direction) for site in before)
    if structure.not_plain_reason is None and cleared and all(is_orthogonal(vector, direction) for vector in added):
        return
    raise UnsupportedError(
        f"no change of weights ablates at {edit.site}: there the direction would have to leave a sum that attention and"
        f" MLP have already read ({edit}). Ablate it in everything that writes to the residual stream, which gives"
        " another model: trimtab.directional_ablation(direction, layers), or trimtab convert FILE OUT --as ablate"
        " --blocks N"
    )


def _removes(map_: Affine, direction: Tensor) -> bool:
    return map_.ablates and map_.output_is_orthogonal(direction)
