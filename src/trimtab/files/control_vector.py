"""GGUF control vectors: tensors `direction.<N>`, one `[width]` vector per block, which many programs read and write.

N is the block (from 0) at whose output the vector is added, as in llama.cpp and repeng. llama.cpp's own
cvector-generator and jukofyork's control-vectors write a vector that was *read* at block N - 1 under N: to add it where
it was read, use a layer offset of -1. Nothing in their files says so reliably, so the offset is never guessed.
"""

from __future__ import annotations

import math
import mmap
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import write_atomically
from trimtab.files.foreign import FormatWarning, Imported, additions, layer_number, model_family, sum_additions
from trimtab.files.gguf_container import TYPES, Container, TensorInfo, read_container
from trimtab.keywords import caller_stacklevel
from trimtab.steering import Steering

ARCHITECTURES = ("controlvector", "steeringvector")  # the latter is dialz's
PREFIX = "direction."
OURS = "controlvector.trimtab."
INT32 = 5
SHIFTED = (
    "{why}; {program} writes files whose direction.N was read at the output of block N-1. It is added at block N, as"
    " in llama.cpp. To add it where it was read, pass --layer-offset -1 to trimtab convert (in Python"
    " layer_offset=-1); to keep it at block N, pass 0"
)


def read_control_vector(path: Path) -> Imported:
    """The directions of a GGUF control vector.

    Raises `TrimtabError` for another kind of file, a damaged one, and for content that none of these programs writes:
    two vectors for one block, vectors that aren't one-dimensional, or quantized.
    """
    with path.open("rb") as stream:
        try:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise TrimtabError("it is empty") from None
        with data:
            container = read_container(data, _check)
            if "general.architecture" not in container.metadata:
                raise TrimtabError("it doesn't say that it is a control vector (no general.architecture)")
            directions = _directions(data, container)
    kind, about = _writer(container)
    return Imported(kind, additions(directions), about, _layer_warning(container, len(directions)))


def _layer_warning(container: Container, vectors: int) -> str | None:
    """A sign that its layers may mean other blocks, if there is one; not every file of these programs has it."""
    count = container.metadata.get("controlvector.layer_count")
    if container.kinds.get("controlvector.layer_count") == INT32:
        return SHIFTED.format(why="its layer count is a signed number", program="llama.cpp's cvector-generator")
    if count is not None and count != vectors:
        why = f"its layer count is {count}, but it has {vectors} vectors"
        return SHIFTED.format(why=why, program="jukofyork's control-vectors")
    return None


def _check(key: str, value: Any) -> None:
    if key == "general.architecture" and value not in ARCHITECTURES:
        raise TrimtabError(f"it is a GGUF file of {str(value)[:40]!r}, perhaps a model, not a control vector")
    if key == "hook_site" and value != "resid_post":
        raise TrimtabError(f"its directions are for the hook site {value!r}, and only resid_post can be read")


def _directions(data: Any, container: Container) -> dict[int, Tensor]:
    directions: dict[int, Tensor] = {}
    infos = {name: info for name, info in container.tensors.items() if name.startswith(PREFIX)}
    remaining = len(data)
    for name, place in infos.items():
        number = name.removeprefix(PREFIX)
        layer = -1 if number == "-1" else layer_number(number, f"the tensor {name!r}")
        size = _size(name, place)
        remaining -= size
        if place.start + size > len(data) or remaining < 0:
            raise TrimtabError(f"it is cut short or damaged: the tensor {name!r} reaches past its end")
        directions[layer] = _tensor(data[place.start : place.start + size], place)
    total = container.metadata.get("n_total_layers")  # steerkit's: the final norm comes after the last block
    if isinstance(total, int) and total in directions:
        raise TrimtabError(f"its direction.{total} is for the final norm, which isn't the output of a block")
    return directions


def _size(name: str, info: TensorInfo) -> int:
    if info.type not in TYPES:
        raise TrimtabError(f"its tensor {name!r} is of GGUF type {info.type}; {_known()} are read")
    if len(info.shape) != 1 or not info.shape[0]:
        raise TrimtabError(f"its tensor {name!r} has shape {list(info.shape)}; a direction has shape [width]")
    return info.shape[0] * TYPES[info.type][1]


def _known() -> str:
    return ", ".join(name for name, _ in TYPES.values())


def _tensor(data: bytes, info: TensorInfo) -> Tensor:
    dtype = {"F32": torch.float32, "F16": torch.float16, "F64": torch.float64, "BF16": torch.bfloat16}
    return torch.frombuffer(bytearray(data), dtype=dtype[TYPES[info.type][0]])


def _writer(container: Container) -> tuple[str, dict[str, Any]]:
    """The program that wrote it, as far as the file shows, and the other metadata."""
    metadata = container.metadata
    about: dict[str, Any] = {}
    for key, value in metadata.items():
        name = key.partition(".")[2] if key.startswith(ARCHITECTURES) else key
        plain = not isinstance(value, float) or math.isfinite(value)
        if key not in ("general.architecture", "general.alignment") and name != "layer_count" and plain:
            about[name] = value
    if any(key.startswith(OURS) for key in metadata):
        return "control vector of trimtab", about
    if "steerkit.method" in metadata:
        return "steerkit", about
    if "controlvector.method" in metadata:
        return "EasySteer", about
    if metadata["general.architecture"] == "steeringvector":
        return "dialz", about
    if container.kinds.get("controlvector.layer_count") == INT32:
        return "cvector-generator", about
    return "repeng", about


def write_control_vector(steering: Steering, path: Path, target: str) -> None:
    """Write the steering's additions as a GGUF control vector, with strengths folded in.

    `target` is `"llama.cpp"`, which adds at every block but the first (a direction for that is left out, with a
    warning), `"repeng"` or `"easysteer"`. Raises `UnsupportedError` for anything that isn't an addition at every token,
    and `TrimtabError` if no direction is left.
    """
    sites = sum_additions(steering, f"a control vector for {target}")
    directions = {site.layer: vector for site, vector in sites.items()}
    if target == "llama.cpp" and directions.pop(0, None) is not None:
        if not directions:
            raise TrimtabError("llama.cpp can't steer block 0, and this steering has no other")
        message = "llama.cpp can't steer block 0 and rejects files that try; its direction is left out"
        warnings.warn(message, FormatWarning, stacklevel=caller_stacklevel())
    extra = {"controlvector.method": steering.card.method} if target == "easysteer" else {}
    about = {
        "controlvector.model_hint": model_family(steering) or "unknown",
        **extra,
        f"{OURS}method": steering.card.method,
        f"{OURS}model": next((model.name for model in steering.card.models), ""),
    }
    write_atomically(path, control_vector(directions, about))


def control_vector(directions: Mapping[int, Tensor], about: Mapping[str, str]) -> bytes:
    """The bytes of a GGUF file with the vectors `[width]` in float32 and these metadata texts."""
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "control-vector.gguf"
        writer = GGUFWriter(path, "controlvector")
        for key, value in about.items():
            writer.add_string(key, value)
        writer.add_uint32("controlvector.layer_count", len(directions))
        for layer in sorted(directions):
            writer.add_tensor(f"{PREFIX}{layer}", np.ascontiguousarray(directions[layer].float().numpy()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()
