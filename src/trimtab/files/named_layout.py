"""Named tensors, as in dicts in `.pt` files, `.npz` files, safetensors files and JSON.

The names are those of layers (`14`, `layer_14`, `model.layers.14`, `blocks.14.hook_resid_post`, `direction.14`), of the
parts of one vector (`{vector, layer}`), or anything else; then the caller selects one by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.files.foreign import Imported, additions, check_vector, layer_number
from trimtab.files.tensor_layout import FEATURES, OUTPUT_NAME, Selection, convert_with, tensor_layout

HOOK = re.compile(r"(?:[A-Za-z_]+\.)*(?:layers|h|blocks|layer)\.(\d+)(?:\.(hook_\w+))?")
PLAIN = re.compile(r"(?:layer[_.-]?|direction\.|L)?(\d+)")
HOOK_OFFSETS: dict[str | None, int] = {None: 0, "hook_resid_post": 0, "hook_resid_pre": -1}
"""TransformerLens' hook points on the residual stream, and the offset to the block whose output that is."""
VECTOR = ("vector", "direction", "steering_vector")
LAYER = ("layer", "layer_idx", "layer_index")


@dataclass(frozen=True)
class NamedTensors:
    """A file's tensors by name: their shapes, how to read one, and the file's other metadata."""

    shapes: Mapping[str, Sequence[int]]
    get: Callable[[str], Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "tensor"


def named_tensors(
    tensors: Mapping[Any, Tensor], about: Mapping[str, Any] | None = None, kind: str = "tensor"
) -> NamedTensors:
    """A `NamedTensors` of tensors in memory. Raises `TrimtabError` if two keys are the same as texts."""
    named = {str(key): value for key, value in tensors.items()}
    if len(named) < len(tensors):
        raise TrimtabError("two of its keys differ only in type")
    return NamedTensors(
        {name: list(value.shape) for name, value in named.items()}, named.__getitem__, about or {}, kind
    )


def block_named(name: str) -> int | None:
    """The block at whose output a vector with this name acts (-1: the embeddings); `None` if the name doesn't say.

    Raises `TrimtabError` for a hook point of a block that isn't on the residual stream.
    """
    if match := HOOK.fullmatch(name):
        if match[2] not in HOOK_OFFSETS:
            raise TrimtabError(
                f"{name!r} isn't a place in the residual stream; {', '.join(filter(None, HOOK_OFFSETS))} can be read"
            )
        return layer_number(match[1], f"{name!r}") + HOOK_OFFSETS[match[2]]
    match = PLAIN.fullmatch(name)
    return layer_number(match[1], f"{name!r}") if match else None


def named_layout(file: NamedTensors, path: Path, selection: Selection) -> Imported:
    """The directions in a file of named tensors. Raises `TrimtabError` if the names don't show what they are."""
    names = list(file.shapes)
    if not names:
        raise TrimtabError("it holds no directions")
    if vectors := [name for name in names if name in VECTOR]:
        others = [name for name in names if name not in vectors and name not in LAYER]
        if len(vectors) == 1 and not others:
            return _vector_and_layer(file, vectors[0], path, selection)
    if {"W_enc", "W_dec"} <= set(names):
        raise TrimtabError(FEATURES.format(path=quote(str(path)), new=OUTPUT_NAME))
    blocks = {name: block_named(name) for name in names}
    if all(block is not None for block in blocks.values()):
        return _layers(file, {name: block for name, block in blocks.items() if block is not None}, selection)
    if isinstance(selection.row, str) and selection.row in file.shapes:
        imported = tensor_layout(file.get(selection.row), path, replace(selection, row=None), file.kind)
        return replace(imported, about={**_plain(file.about), **imported.about, "row": selection.row})
    if len(names) == 1:
        imported = tensor_layout(file.get(names[0]), path, selection, file.kind)
        return replace(imported, about={**_plain(file.about), **imported.about})
    shown = [f"{name[:60]} {list(file.shapes[name])}" for name in names[:4]]
    listing = ", ".join(shown) + (f", … {len(names) - 4} more" if len(names) > 4 else "")
    if selection.row is not None:
        raise TrimtabError(f"it has no tensor {str(selection.row)[:60]!r}; its tensors are {listing}")
    raise TrimtabError(
        f"it isn't a trimtab steering; its tensors are {listing}, whose names aren't layers (14, layer_14,"
        " model.layers.14, direction.14). To use one of them:"
        f" {convert_with(path, '--row NAME --layer N', 'row=NAME, layer=N')}"
    )


def _vector_and_layer(file: NamedTensors, name: str, path: Path, selection: Selection) -> Imported:
    """`{vector, layer}`, or a bare tensor without the layer. The caller's arguments take precedence over the file."""
    file_layer: Any = None
    for key in LAYER:
        if key in file.shapes:
            value = file.get(key)
            number = float(value.reshape(-1)[0]) if value.numel() == 1 else math.nan
            if not number.is_integer():
                raise TrimtabError(f"its {key} isn't a whole number")
            file_layer = int(number)
        elif key in file.about:
            file_layer = file.about[key]
    if file_layer is not None and selection.layer is None:
        selection = replace(selection, layer=layer_number(file_layer, "it"))
    imported = tensor_layout(file.get(name), path, selection, file.kind)
    about = {key: value for key, value in _plain(file.about).items() if key not in LAYER}
    return replace(imported, about={**about, **imported.about})


def _layers(file: NamedTensors, blocks: Mapping[str, int], selection: Selection) -> Imported:
    replace(selection, row=None).check_unused()
    if selection.row is not None and not all(len(file.shapes[name]) == 2 for name in blocks):
        selection.check_no_row()
    if len(set(blocks.values())) < len(blocks):
        raise TrimtabError(f"two of its tensors are for the same block: {', '.join(sorted(blocks)[:6])}")
    directions = {}
    for name, block in blocks.items():
        value = file.get(name)
        rows = value.shape[0] if value.dim() == 2 else 1
        if selection.row is not None:
            if isinstance(selection.row, str) or not 0 <= selection.row < rows:
                raise TrimtabError(f"{name!r} has rows 0 to {rows - 1}, but no row {selection.row!r}")
            value = value[selection.row]
        elif rows > 1:
            raise TrimtabError(f"{name!r} has {rows} rows; pass --row R (row=R) to trimtab convert to choose one")
        directions[block] = check_vector(value, repr(name))
    about = _plain(file.about) | ({} if selection.row is None else {"row": selection.row})
    return Imported(f"{file.kind}s by layer", additions(directions), about)


def _plain(about: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a card can keep."""
    return {str(key): value for key, value in about.items() if isinstance(value, (str, int, float, bool))}
