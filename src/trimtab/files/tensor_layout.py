"""What one bare tensor of directions means: `[width]`, `[layers, width]`, or `[positions, layers, width]`.

Such a tensor says nothing of itself. Where a single vector acts is told by the file's name (`layer_<N>`), a `.json`
beside it, or the caller.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.files.foreign import Found, additions, check_vector, layer_number

NAMED_LAYER = re.compile(r"layer_(0|[1-9][0-9]{0,5})")
LARGEST_SIDECAR = 1 << 20
INPUT = "the input of block {}, which is the output of the one before it"


@dataclass(frozen=True)
class Wanted:
    """What a caller says of a file: the layer of its only vector, or which layer and position of a larger tensor.

    `anywhere` is for callers who want one direction and don't mind where it acts: a layer then also picks among
    several, and a single vector needs none.
    """

    layer: int | None = None
    position: int | None = None
    anywhere: bool = False

    def not_needed(self) -> None:
        """Raises `TrimtabError` where something is said of a file that says it itself."""
        if self.layer is not None and not self.anywhere:
            raise TrimtabError("it names its layers itself; leave --layer out, or shift them with --layer-offset")
        if self.position is not None:
            raise TrimtabError("it has no axis of token positions; leave --position out")


def tensor_layout(value: Tensor, path: Path, wanted: Wanted, kind: str = "tensor") -> Found:
    """The directions of a bare tensor.

    Args:
        value: The tensor, of one, two or three axes.
        path: The file, whose name or neighbours may say where a single vector acts.
        wanted: What the caller says.
        kind: What the formats' names begin with.

    Raises:
        TrimtabError: It can't be told what the tensor is, or where it acts.
    """
    if value.dim() == 3 and value.shape[1] > 1:
        return _of_positions(value, wanted, kind)
    if value.dim() == 2 and value.shape[0] > 1:
        wanted.not_needed()
        return Found(f"{kind} of layers", additions(dict(enumerate(value))))
    replace(wanted, layer=None).not_needed()
    vector = check_vector(value, f"its {kind}")
    at, about = layer_of(path, wanted)
    return Found(f"{kind} of one layer", additions({0: vector}, at), about)


def _of_positions(value: Tensor, wanted: Wanted, kind: str) -> Found:
    """refusal_direction's `mean_diffs.pt`: what it read at the last positions of the prompt, at each block's input."""
    positions, layers, width = value.shape
    axes = f"it holds {positions} positions x {layers} layers x {width} wide, as refusal_direction's mean_diffs.pt does"
    if wanted.layer is None or wanted.position is None:
        raise TrimtabError(
            f"{axes}; pick one direction: say --position P (-1 is the prompt's last token) and --layer N to trimtab"
            f" convert (in Python load(path, position=P, layer=N)). Its layer N is {INPUT.format('N')}"
        )
    if not -positions <= wanted.position < positions or not 0 <= wanted.layer < layers:
        raise TrimtabError(
            f"{axes}: there are positions {-positions} to -1 and layers 0 to {layers - 1}, and no position"
            f" {wanted.position} at layer {wanted.layer}"
        )
    vector = check_vector(value[wanted.position, wanted.layer], f"its {kind}")
    about = {"read_at": INPUT.format(wanted.layer), "position": wanted.position}
    return Found(f"{kind} of positions and layers", additions({0: vector}, wanted.layer - 1), about)


def layer_of(path: Path, wanted: Wanted) -> tuple[int, Mapping[str, Any]]:
    """At which block's output a file's only vector acts (-1: at the embeddings), and what else is known of it.

    Raises:
        TrimtabError: Nothing says so, or a file beside it that should is damaged.
    """
    if wanted.layer is not None:
        return wanted.layer, {}
    if match := NAMED_LAYER.fullmatch(path.stem):
        return int(match[1]), {}
    said = _sidecar(path.with_suffix(".json"))
    if isinstance(said, dict) and "layer_index" in said:
        return layer_number(said["layer_index"], path.with_suffix(".json").name), {}
    beside = path.with_name(f"{path.stem}_metadata.json")  # refusal_direction's, whose layers are blocks' inputs
    if beside.is_file():
        said = _sidecar(beside)
        if not isinstance(said, dict) or "layer" not in said:
            raise TrimtabError(f"{beside.name} beside it doesn't say its layer; mend it, or say --layer N (layer=N)")
        layer = layer_number(said["layer"], beside.name)
        about = {"read_at": INPUT.format(layer)} | (
            {"position": said["pos"]} if isinstance(said.get("pos"), int) else {}
        )
        return layer - 1, about
    if wanted.anywhere:
        return 0, {}
    raise TrimtabError(
        "it doesn't say at which block its vector acts; say --layer N to trimtab convert, and use the file that it"
        " writes (in Python load(path, layer=N)). To ablate the direction everywhere: trimtab convert --as ablate"
    )


def _sidecar(path: Path) -> Any:
    if not path.is_file() or path.stat().st_size >= LARGEST_SIDECAR:
        return None
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
