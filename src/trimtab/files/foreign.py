"""The common form of other programs' files, and the check whether a steering can be written in their formats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Add, Always, Card, Edit, Operation, Positions, Site, Steering
from trimtab.steering.positions import NAMED

LARGEST_LAYER = 100_000
WIDEST = 1 << 24
LAYER = re.compile(r"0|[1-9][0-9]{0,5}")


class FormatWarning(UserWarning):
    """A file was read or written as faithfully as its format allows, but something is lost or ambiguous."""


@dataclass(frozen=True)
class Imported:
    """The content of a file: operations by layer, each at the output of a block counted from 0 (-1: the embeddings).

    `about` is what else the file says that a card can keep; `warning` is a warning to give if the caller sets no layer
    offset.
    """

    format: str
    operations: tuple[tuple[int, Operation], ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    warning: str | None = None
    kind: str = "residual"


def steering_of(imported: Imported, *, layer_offset: int = 0, positions: Positions | None = None) -> Steering:
    """The steering: every operation at its layer plus `layer_offset`, at all positions unless others are given.

    Raises `TrimtabError` for a layer that can't be a block, and for directions of different widths.
    """
    widths = sorted({operation.width for _, operation in imported.operations})
    if not imported.operations:
        raise TrimtabError("it holds no directions")
    if len(widths) > 1:
        raise TrimtabError(f"its directions have different widths: {', '.join(map(str, widths))}")
    edits = []
    for layer, operation in imported.operations:
        site = _site(layer + layer_offset, imported.kind)
        edits.append(Edit(site, operation, Positions.all() if positions is None else positions))
    options = {"format": imported.format, **imported.about}
    if layer_offset:
        options["layer_offset"] = layer_offset
    return Steering(tuple(edits), Card("imported", options=options))


def _site(layer: int, kind: str) -> Site:
    if kind == "residual" and layer == -1:
        return Site(0, "block_input")  # the embeddings
    if not 0 <= layer <= LARGEST_LAYER:
        raise TrimtabError(f"there is no block {layer}; blocks are numbered from 0, see the layer offset")
    return Site(layer, kind)


def additions(directions: Mapping[int, Tensor], first: int = 0) -> tuple[tuple[int, Operation], ...]:
    """An `Add` for each direction `[width]`, in the order of the layers, which count from `first`."""
    return tuple((first + n, Add(check_vector(directions[n], f"layer {n}"))) for n in sorted(directions))


def check_vector(value: Any, name: str) -> Tensor:
    """A `[width]` vector from a file, as float32 (float64 stays).

    Raises `TrimtabError` for anything else: another shape, numbers that aren't floating-point, a NaN, an absurd width.
    """
    if not isinstance(value, Tensor):
        raise TrimtabError(f"{name} holds a {type(value).__name__} instead of a tensor")
    if value.dim() == 2 and value.shape[0] == 1:
        value = value[0]
    if value.dim() != 1 or not 0 < value.shape[0] <= WIDEST:
        raise TrimtabError(f"{name} has shape {list(value.shape)}; a direction has shape [width]")
    if value.layout != torch.strided or not value.is_floating_point():
        raise TrimtabError(f"{name} has dtype {value.dtype}; a direction must be floating point")
    value = value.detach().to(torch.float64 if value.dtype == torch.float64 else torch.float32)
    if not bool(torch.isfinite(value).all()):
        raise TrimtabError(f"{name} holds numbers that are NaN or infinite")
    return value


def layer_number(text: object, name: str) -> int:
    """The layer that a key of a file names. Raises `TrimtabError` unless it is a plain whole number."""
    if isinstance(text, int) and not isinstance(text, bool):
        text = str(text)
    if not isinstance(text, str) or not LAYER.fullmatch(text):
        raise TrimtabError(f"{name} has a layer {str(text)[:40]!r}, which isn't the number of a block")
    return int(text)


def model_family(steering: Steering) -> str | None:
    """The family of the model that the steering is for, from its card (`llama`, `qwen2` …)."""
    for model in steering.card.models:
        return model.family
    hint = steering.card.options.get("model_hint")
    return hint if isinstance(hint, str) else None


def sum_additions(steering: Steering, target: str, kinds: Iterable[str] = ("residual",)) -> dict[Site, Tensor]:
    """One vector `[width]` (float32) per site, the sum of strengths times directions, of a steering that only adds.

    Raises `UnsupportedError` for a steering that does anything else, or not at every token, naming what `target` can't
    do.
    """
    kinds = tuple(kinds)
    sums: dict[Site, Tensor] = {}
    for edit in steering.edits:
        operation = edit.operation
        if not isinstance(operation, Add):
            raise UnsupportedError(f"{target} can only add directions, and this steering has {edit}")
        if edit.site.kind not in kinds:
            raise UnsupportedError(f"{target} steers {' or '.join(kinds)} only, but this steering has {edit}")
        check_plain(edit, target)
        vector = operation.direction.double() * edit.strength
        if edit.site in sums and sums[edit.site].shape != vector.shape:
            raise TrimtabError(f"the steering adds directions of different widths at {edit.site}")
        sums[edit.site] = sums[edit.site] + vector if edit.site in sums else vector
    if not sums:
        raise TrimtabError("the steering has no edits, so there is nothing to write")
    if len({len(vector) for vector in sums.values()}) > 1:
        raise TrimtabError("the steering's directions have different widths")
    return {site: sums[site].float() for site in sorted(sums)}


def check_plain(edit: Edit, target: str) -> None:
    """Raises `UnsupportedError` for an edit with a gate, with `keep_norm`, or with positions other than all."""
    if edit.operation.keep_norm:
        raise UnsupportedError(f"{target} can't keep the activation's norm, as this steering asks: {edit}")
    if not isinstance(edit.gate, Always):
        raise UnsupportedError(f"{target} has no gates, but this steering has one: {edit}")
    if edit.positions != NAMED["all"]:
        raise UnsupportedError(
            f"{target} steers every token of prompt and answer, but this steering acts at {edit.positions}; if that"
            " is what you want, use steering.at(Positions.all()), on the command line --positions all"
        )
