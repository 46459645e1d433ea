"""One safetensors file per steering: tensors, and one header entry with everything else as canonical JSON.

A steering with one direction per layer names its tensors `direction.<N>`, N being the block (from 0) at whose output
the direction acts, as GGUF control vectors do; otherwise `edit.<i>.direction`. An operation's other tensors are
`edit.<i>.<attribute>`. The same steering always gives the same bytes, writes are atomic, and a digest in the header
covers both tensors and text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import write_atomically
from trimtab.keywords import keywords
from trimtab.steering import Adapter, Always, Card, Edit, Gate, ModelId, Operation, Positions, Site, Steering, Threshold
from trimtab.steering.attention import SCORE_NAMES, SCORE_OPERATIONS, ScoreOperation
from trimtab.steering.gates import LAST, AllOf, AnyOf, Not
from trimtab.steering.operations import NAMES, OPERATIONS, Directed
from trimtab.steering.steering import check_steering

FORMAT = 1
MEANING_FORMAT = 2
"""The format of files with positions by meaning; all others have the first format, which older versions read."""
KEY = "trimtab"
OPTIONAL_CARD_FIELDS = ("divergence", "audit")
"""Fields of a card that later versions added."""
GATE_DEFAULTS: dict[str, Any] = {"pool": "mean", "bias": 0.0, "each_token": False}
LARGEST_HEADER = 100_000_000  # bytes, as in safetensors itself


@keywords
def save_steering(steering: Steering, path: str | Path) -> str:
    """Write a steering to a file, atomically: readers never see a partial file.

    Args:
        steering: The steering.
        path: The file, named `*.safetensors`. An existing one is replaced.

    Returns:
        The digest of the file's content, in hexadecimal. The same steering always has the same digest.

    Raises:
        TrimtabError: The steering has no edits, the file has another suffix, its folder doesn't exist or can't be
            written, or a card, gate or number can't be represented in JSON.
    """
    check_steering(steering)
    path = Path(path)
    if path.suffix != ".safetensors":
        raise TrimtabError(f"a steering is saved as a .safetensors file, not {path.name!r}")
    digest, data = _encoded(steering)
    write_atomically(path, data)
    return digest


def steering_to_bytes(steering: Steering) -> bytes:
    """The bytes that `save_steering` writes. Raises as it does."""
    return _encoded(steering)[1]


def _encoded(steering: Steering) -> tuple[str, bytes]:
    if not steering.edits:
        raise TrimtabError("the steering has no edits, so there is nothing to save")
    header, tensors, digest = _content(steering)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}  # edits may share one: of a gate, say
    return digest, save(copies, metadata={KEY: _json({**header, "digest": digest})})


def steering_digest(steering: Steering) -> str:
    """The digest of the steering's file, which covers its edits and its card."""
    return _content(steering)[2]


def edits_digest(steering: Steering) -> str:
    """A digest of the edits alone, without the card; measurements that store it apply to these edits."""
    return steering_digest(Steering(steering.edits))


def describes(measured: Mapping[str, Any], steering: Steering) -> bool:
    """Whether a card's `audit` or `divergence` was measured with exactly these edits."""
    return measured.get("edits") == edits_digest(steering)


def load_steering(path: str | Path) -> Steering:
    """Read a file that `save_steering` wrote.

    Raises `TrimtabError` if it doesn't exist, or is truncated, altered, of another kind or of a newer format.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            return _decoded(path, stream)
    except FileNotFoundError:
        raise TrimtabError(f"there is no file {path}") from None
    except OSError as error:
        raise TrimtabError(f"can't read {path}: {error.strerror}") from None


def steering_from_bytes(data: bytes, name: str) -> Steering:
    """The steering in these bytes; error messages call it `name`. Raises as `load_steering` does."""
    return _decoded(Path(name), BytesIO(data))


def _decoded(path: Path, stream: BinaryIO) -> Steering:
    header, tensors = _read(path, stream)
    if header.get("format") not in (FORMAT, MEANING_FORMAT):
        raise TrimtabError(
            f"{path} has format {header.get('format')}, this trimtab reads {MEANING_FORMAT}; update trimtab"
        )
    digest = header.pop("digest", None)
    try:
        if digest != _digest(header, tensors):
            raise TrimtabError("it was altered after it was written (digest mismatch); get a fresh copy")
        edits = tuple(_edit(data, tensors) for data in header["edits"])
        return Steering(edits, _card(header["card"]))
    except TrimtabError as error:
        raise TrimtabError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        raise TrimtabError(
            f"{path} isn't a valid steering: {type(error).__name__}: {error}; get a fresh copy"
        ) from None


def _content(steering: Steering) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    tensors: dict[str, Tensor] = {}
    header = _header(steering, tensors)
    try:
        return header, tensors, _digest(header, tensors)
    except (TypeError, ValueError) as error:
        raise TrimtabError(
            f"the steering's card and settings must be finite numbers, strings and lists of these: {error}"
        ) from None


def _read(path: Path, stream: BinaryIO) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors. A file of another kind is recognized by its first bytes, however large it is."""
    start = stream.read(8)
    size = int.from_bytes(start, "little")
    start += stream.read(size) if size <= LARGEST_HEADER else b""
    metadata = _metadata(path, start)
    data = start + stream.read()
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise TrimtabError(f"{path} is cut short or damaged: {error}; get a fresh copy") from None
    try:
        header = json.loads(metadata[KEY])
    except (ValueError, TypeError, RecursionError):
        raise TrimtabError(f"{path} has a damaged header; get a fresh copy") from None
    if not isinstance(header, dict):
        raise TrimtabError(f"{path} has a damaged header; get a fresh copy")
    return header, tensors


def _metadata(path: Path | str, start: bytes) -> dict[str, Any]:
    """The metadata at the start of a safetensors file: the header's size in 8 bytes, then the header as JSON."""
    # the first bytes alone aren't enough: they are a size here, and one header size in 32 begins with \x80
    if start[8:9] != b"{" and (start[:1] == b"\x80" or start[:2] == b"PK"):
        raise TrimtabError(f"{path} looks like a pickle, which trimtab never opens; it reads .safetensors files only")
    if len(start) < 8 or len(start) < 8 + int.from_bytes(start[:8], "little"):
        raise TrimtabError(f"{path} isn't a safetensors file, or it is cut short; get a fresh copy")
    try:
        header = json.loads(start[8:])
    except (ValueError, RecursionError):
        raise TrimtabError(f"{path} isn't a safetensors file, or its header is damaged; get a fresh copy") from None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or KEY not in metadata:
        raise TrimtabError(f"{path} is a safetensors file, but not a trimtab steering; `trimtab learn` writes them")
    return metadata


def _header(steering: Steering, tensors: dict[str, Tensor]) -> dict[str, Any]:
    layers = [edit.site.layer for edit in steering.edits]
    plain = len(set(layers)) == len(layers) and all(e.site.kind in ("residual", "scores") for e in steering.edits)
    edits = []
    for i, edit in enumerate(steering.edits):
        name = f"direction.{edit.site.layer}" if plain else f"edit.{i}.direction"
        operation = edit.operation
        settings = {f.name: getattr(operation, f.name) for f in fields(operation) if f.name != "direction"}
        if isinstance(operation, ScoreOperation):  # all numbers, no direction
            settings = {"name": SCORE_NAMES[type(operation)], **settings}
        else:
            for key, value in settings.items():
                if isinstance(value, Tensor):
                    tensors[f"edit.{i}.{key}"] = value
                    settings[key] = {"tensor": f"edit.{i}.{key}"}
            settings = {"name": NAMES[type(operation)], **settings}
            if isinstance(operation, Directed):
                tensors[name] = operation.direction
                settings["direction"] = name
        edits.append(
            {
                "site": asdict(edit.site),
                "positions": edit.positions.to_json(),
                "operation": settings,
                "strength": edit.strength,
                "gate": _gate_json(edit.gate, f"edit.{i}.gate", tensors),
            }
        )
    return {
        "format": MEANING_FORMAT if any(edit.positions.rule is not None for edit in steering.edits) else FORMAT,
        "layer_convention": "block output, counted from 0",
        "edits": edits,
        "card": card_json(steering.card),
    }


def card_json(card: Card) -> dict[str, Any]:
    """A card as JSON values; unmeasured fields are left out, so that files without them keep their digest."""
    data = {
        name: value for name, value in asdict(card).items() if name not in OPTIONAL_CARD_FIELDS or value is not None
    }
    model = None if card.model is None else card.model.as_json()
    return {**data, "model": model, "parts": [card_json(part) for part in card.parts]}


def _edit(data: dict[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    settings = dict(data["operation"])
    name = settings.pop("name")
    operation: Operation | ScoreOperation
    if name in SCORE_OPERATIONS:
        operation = SCORE_OPERATIONS[name](**settings)
    else:
        settings = {key: tensors[v["tensor"]] if isinstance(v, dict) else v for key, v in settings.items()}
        if "direction" in settings:
            settings["direction"] = tensors[settings["direction"]]
        operation = OPERATIONS[name](**settings)
    return Edit(
        site=Site(**data["site"]),
        operation=operation,
        positions=Positions.from_json(data["positions"]),
        strength=data["strength"],
        gate=_gate(data["gate"], tensors),
    )


def _gate_json(gate: Gate, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(gate, Always):
        return "always"
    if isinstance(gate, Not):
        return {"not": _gate_json(gate.gate, f"{name}.0", tensors)}
    if isinstance(gate, (AllOf, AnyOf)):
        parts = [_gate_json(part, f"{name}.{i}", tensors) for i, part in enumerate(gate.gates)]
        return {"all" if isinstance(gate, AllOf) else "any": parts}
    if isinstance(gate, Threshold):
        tensors[name] = gate.direction
        more: dict[str, Any] = {}  # only what isn't the default, so that older files keep their digest
        if gate.positions != LAST:
            more["positions"] = gate.positions.to_json()
        more |= {key: getattr(gate, key) for key, usual in GATE_DEFAULTS.items() if getattr(gate, key) != usual}
        return {
            "site": asdict(gate.site),
            "direction": name,
            "threshold": gate.threshold,
            "measure": gate.measure,
            **more,
        }
    raise TrimtabError(f"a {type(gate).__name__} gate can't be saved")


def _gate(data: Any, tensors: Mapping[str, Tensor]) -> Gate:
    if data == "always":
        return Always()
    if "not" in data:
        return Not(_gate(data["not"], tensors))
    for key, kind in (("all", AllOf), ("any", AnyOf)):
        if key in data:
            return kind(tuple(_gate(part, tensors) for part in data[key]))
    more = {key: data[key] for key in GATE_DEFAULTS if key in data}
    if "positions" in data:
        more["positions"] = Positions.from_json(data["positions"])
    return Threshold(Site(**data["site"]), tensors[data["direction"]], data["threshold"], data["measure"], **more)


def _model(data: dict[str, Any]) -> ModelId:
    return ModelId(**{**data, "adapters": tuple(Adapter(**adapter) for adapter in data.get("adapters", ()))})


def _card(data: dict[str, Any]) -> Card:
    model = None if data["model"] is None else _model(data["model"])
    parts = tuple(_card(part) for part in data["parts"])
    if odd := [name for name in OPTIONAL_CARD_FIELDS if not isinstance(data.get(name), (dict, type(None)))]:
        raise TypeError(f"a card's {odd[0]} must be an object")
    return Card(**{**data, "model": model, "parts": parts})


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(_json({k: v for k, v in header.items() if k != "digest"}).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
