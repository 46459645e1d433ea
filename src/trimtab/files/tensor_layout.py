"""The meaning of one bare tensor: a vector `[width]`, rows `[rows, width]`, or three axes with the width last.

Such a tensor doesn't describe itself. Its rows may be blocks, the embeddings and then blocks, or concepts, and
confusing these would silently steer at the wrong place: the caller must say what the rows are. The layer of a single
vector is given by the caller, the file's name (`layer_<N>`), or a `.json` file next to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.files.foreign import Imported, additions, check_vector, layer_number

NAMED_LAYER = re.compile(r"layer_(0|[1-9][0-9]{0,5})")
LARGEST_SIDECAR = 1 << 20
INPUT = "the input of block {}, which is the output of the one before it"
OUTPUT_NAME = "steering.safetensors"
FEATURES = (  # the path is quoted by the caller
    "it is a sparse autoencoder; choose its features: trimtab convert {path} {new} --feature NUMBER:VALUE"
    " (in Python load_features(path, {{number: value}}))"
)


@dataclass(frozen=True)
class Selection:
    """What a caller says about a file.

    `row` is the row of a matrix, or the name of one of several tensors. `layer` is the layer of a single vector, or the
    layer to use of a larger tensor, and `position` the position to use of a tensor with positions. `layer_offset` says
    that rows are blocks (it is added to their numbers later). `anywhere` is for callers who want one direction,
    wherever it acts: a layer then also selects one of several, and a single vector needs none.
    """

    row: int | str | None = None
    layer: int | None = None
    position: int | None = None
    layer_offset: int | None = None
    anywhere: bool = False

    def check_unused(self) -> None:
        """Raises `TrimtabError` if the caller says something that the file says itself."""
        if self.layer is not None and not self.anywhere:
            raise TrimtabError("it already names its layers; leave --layer out, or shift them with --layer-offset")
        self.check_no_row()
        if self.position is not None:
            raise TrimtabError("it has no axis of token positions; leave --position out")

    def check_no_row(self) -> None:
        """Raises `TrimtabError` if the caller names a row and there are none to choose from."""
        if self.row is not None:
            raise TrimtabError("it has no rows to choose from; leave --row out")


def convert_with(path: Path, options: str, python: str) -> str:
    """How to pass the missing information, on the command line and in Python."""
    return f"trimtab convert {quote(str(path))} {OUTPUT_NAME} {options} (in Python load(path, {python}))"


def tensor_layout(value: Tensor, path: Path, selection: Selection, kind: str = "tensor") -> Imported:
    """The directions in a bare tensor.

    Args:
        value: The tensor, with one, two or three axes; axes of length 1 are dropped unless a row or position is given.
        path: The file; its name, or a file next to it, may give the layer of a single vector.
        selection: What the caller says.
        kind: The prefix of the format's name.

    Raises:
        TrimtabError: It isn't clear what the tensor is, or where it acts.
    """
    if value.dim() == 3 and selection.position is not None:
        return _of_positions(value, path, selection, kind)
    while value.dim() > 1 and selection.row is None and 1 in value.shape[:-1]:
        value = value.squeeze(tuple(value.shape[:-1]).index(1))
    if value.dim() == 3:
        return _of_three_axes(value, path, selection, kind)
    if value.dim() == 2:
        return _of_rows(value, path, selection, kind)
    replace(selection, layer=None).check_unused()
    vector = check_vector(value, f"its {kind}")
    at, about = layer_of(path, selection)
    return Imported(f"{kind} of one layer", additions({0: vector}, at), about)


def _of_rows(value: Tensor, path: Path, selection: Selection, kind: str) -> Imported:
    rows, width = value.shape
    if selection.position is not None:
        raise TrimtabError("it has no axis of token positions; leave --position out")
    row = _row(selection.row, rows)
    if row is None and selection.anywhere and selection.layer is not None:  # any one of them, numbered as in the file
        row = _row(selection.layer, rows, "layer")
    if row is not None:
        vector = check_vector(value[row], f"row {row}")
        if selection.layer is None and selection.layer_offset is not None:
            return Imported(f"row {row} of a {kind} of layers", additions({row: vector}))
        at, about = layer_of(path, replace(selection, row=None))
        return Imported(f"row {row} of a {kind}", additions({0: vector}, at), {**about, "row": row})
    if selection.layer_offset is not None and selection.layer is None:
        return Imported(f"{kind} of layers", additions(dict(enumerate(value))))
    if selection.anywhere:
        raise TrimtabError(f"it has several directions, {rows} rows; pass --row R (row=R) to choose one")
    for_one_row, every = convert_with(path, "--row R --layer N", "row=R, layer=N"), "--layer-offset K (layer_offset=K)"
    raise TrimtabError(
        f"it holds {rows} rows of {width} numbers, but doesn't say what the rows are. To use one of them:"
        f" {for_one_row}. If they are blocks, pass {every} instead: 0 if row 0 is the output of block 0, -1 if row 0"
        " is the embeddings, as in hidden_states"
    )


def _of_three_axes(value: Tensor, path: Path, selection: Selection, kind: str) -> Imported:
    first, second, width = value.shape
    row = _row(selection.row, first)
    if row is not None and selection.layer is None:
        return _of_rows(value[row], path, replace(selection, row=None), kind)
    if row is not None and selection.layer is not None and (selection.layer_offset is not None or selection.anywhere):
        vector = check_vector(value[row, _row(selection.layer, second, "layer")], f"its {kind}")
        return Imported(f"row {row} of a {kind} of rows and layers", additions({selection.layer: vector}), {"row": row})
    shown = f"it holds {first} x {second} x {width} numbers, but doesn't say what its axes are"
    mean_diffs = f"refusal_direction's mean_diffs.pt, whose layer N is {INPUT.format('N')}"
    means = convert_with(path, "--position P --layer N", "position=P, layer=N")
    other = convert_with(path, "--row R --layer-offset K", "row=R, layer_offset=K")
    raise TrimtabError(
        f"{shown}. If they are token positions x layers, as in {mean_diffs}: {means}; -1 is the prompt's last token. If"
        f" they are rows (such as concepts) x layers: {other}, with K=0 if layer 0 is the output of block 0, -1 if it"
        " is the embeddings; with --layer N as well, only that layer is used"
    )


def _of_positions(value: Tensor, path: Path, selection: Selection, kind: str) -> Imported:
    """refusal_direction's `mean_diffs.pt`: directions at the last positions of the prompt, at each block's input."""
    selection.check_no_row()
    positions, layers, width = value.shape
    axes = f"it holds {positions} positions x {layers} layers x {width} wide"
    if selection.layer is None:
        means = convert_with(path, "--position P --layer N", "position=P, layer=N")
        raise TrimtabError(f"{axes}, as refusal_direction's mean_diffs.pt does; choose the layer too: {means}")
    assert selection.position is not None
    if not -positions <= selection.position < positions or not 0 <= selection.layer < layers:
        raise TrimtabError(
            f"{axes}: there are positions {-positions} to -1 and layers 0 to {layers - 1}, but no position"
            f" {selection.position} at layer {selection.layer}"
        )
    vector = check_vector(value[selection.position, selection.layer], f"its {kind}")
    about = {"read_at": INPUT.format(selection.layer), "position": selection.position}
    return Imported(f"{kind} of positions and layers", additions({0: vector}, selection.layer - 1), about)


def _row(row: int | str | None, rows: int, name: str = "row") -> int | None:
    if row is None:
        return None
    if isinstance(row, str):
        raise TrimtabError(
            f"its rows have no names, so there is no row {row!r}; rows are numbered from 0 to {rows - 1}"
        )
    if not 0 <= row < rows:
        raise TrimtabError(f"there is no {name} {row}; {name}s are numbered from 0 to {rows - 1}")
    return row


def layer_of(path: Path, selection: Selection) -> tuple[int, Mapping[str, Any]]:
    """The block at whose output a file's only vector acts (-1: the embeddings), and what else is known about it.

    Raises:
        TrimtabError: Nothing says which, or a file next to it that should is damaged.
    """
    if selection.layer is not None:
        return selection.layer, {}
    if match := NAMED_LAYER.fullmatch(path.stem):
        return int(match[1]), {}
    sidecar = _sidecar(path.with_suffix(".json")) if path.suffix != ".json" else None
    if isinstance(sidecar, dict) and "layer_index" in sidecar:
        return layer_number(sidecar["layer_index"], path.with_suffix(".json").name), {}
    metadata_path = path.with_name(f"{path.stem}_metadata.json")  # refusal_direction's, whose layers are blocks' inputs
    if metadata_path.is_file():
        sidecar = _sidecar(metadata_path)
        if not isinstance(sidecar, dict) or "layer" not in sidecar:
            raise TrimtabError(
                f"{metadata_path.name} next to it doesn't give its layer; fix it, or pass --layer N to trimtab convert"
                " (layer=N)"
            )
        layer = layer_number(sidecar["layer"], metadata_path.name)
        about = {"read_at": INPUT.format(layer)} | (
            {"position": sidecar["pos"]} if isinstance(sidecar.get("pos"), int) else {}
        )
        return layer - 1, about
    if selection.anywhere:
        return 0, {}
    raise TrimtabError(
        "it doesn't say at which block its vector acts. To add it at the output of block N (from 0):"
        f" {convert_with(path, '--layer N', 'layer=N')}. To ablate it everywhere: trimtab convert {quote(str(path))}"
        f" {OUTPUT_NAME} --as ablate --blocks N"
    )


def _sidecar(path: Path) -> Any:
    if not path.is_file() or path.stat().st_size >= LARGEST_SIDECAR:
        return None
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
