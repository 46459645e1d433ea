"""Steering vectors as JSON: the `.svec` of CAST's own program and AISteer360, and vLLM steering modules."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.files.foreign import Imported, additions, check_vector, layer_number
from trimtab.files.named_layout import block_named, named_layout, named_tensors
from trimtab.files.tensor_layout import Selection, tensor_layout

LARGEST = 1 << 28  # bytes
BLOCK = "post_block"  # the only hook whose vector is added to a block's output
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
EARLY = (
    "CAST's own program adds a .svec's vector N at the input of block N, one block before where it was read; it is"
    " added at the output of block N, where it was read. To do as that program does, pass --layer-offset -1 to"
    " trimtab convert (in Python layer_offset=-1); to keep it, pass 0"
)


def read_json_layout(path: Path, selection: Selection) -> Imported:
    """The directions in a JSON file. `selection` is for lists of numbers, which are as ambiguous as a bare tensor.

    Raises `TrimtabError` for JSON of another structure, duplicate keys, numbers that aren't finite, and several vectors
    for one block.
    """
    if path.stat().st_size > LARGEST:
        raise TrimtabError(f"it has {path.stat().st_size >> 20} MB of JSON; a steering is smaller")
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_unique_object, parse_constant=_no_constant)
    except TrimtabError:
        raise
    except (ValueError, RecursionError) as error:
        raise TrimtabError(f"it isn't valid JSON: {str(error)[:120]}") from None
    if isinstance(value, list):
        return tensor_layout(_numbers(value, "its list"), path, selection, "list")
    if isinstance(value, dict) and isinstance(value.get("vector"), list) and "modelId" in value:
        return neuronpedia_vector(value, selection)
    if isinstance(value, dict) and any(isinstance(item, list) for item in value.values()):
        lists = {key: _numbers(item, repr(key)) for key, item in value.items() if isinstance(item, list)}
        rest = {key: item for key, item in value.items() if key not in lists}
        return named_layout(named_tensors(lists, rest, "list"), path, selection)
    selection.check_unused()
    if isinstance(value, dict) and isinstance(value.get("directions"), dict):
        return _svec(value)
    if isinstance(value, dict) and isinstance(value.get("vectors"), dict):
        value = value["vectors"]
    if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
        return _module(value)
    raise TrimtabError("its JSON has no known layout of steering vectors (.svec, steering modules)")


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise TrimtabError(f"its JSON has the key {twice[:80]!r} twice")
    return made


def _no_constant(name: str) -> Any:
    raise TrimtabError(f"its JSON holds {name}, which isn't a number")


def _svec(value: Mapping[str, Any]) -> Imported:
    directions = {}
    for key, rows in value["directions"].items():
        layer = layer_number(key, "its directions")
        vector = _vector(rows, f"layer {key}")
        if vector.dim() == 2 and vector.shape[0] > 1:
            raise TrimtabError(
                f"layer {key} has {vector.shape[0]} vectors (for tokens, heads or a plane), but an addition takes one"
            )
        directions[layer] = vector.reshape(-1)
    about = {"model_hint": value["model_type"]} if isinstance(value.get("model_type"), str) else {}
    variances = value.get("explained_variances")
    if isinstance(variances, dict) and all(isinstance(v, (int, float)) for v in variances.values()):
        about["explained_variances"] = variances
    return Imported("svec", additions(directions), about, EARLY)


def neuronpedia_vector(value: Mapping[str, Any], selection: Selection) -> Imported:
    """A feature or vector in the response of Neuronpedia's `/api/feature/MODEL/SOURCE/INDEX`, added with strength 1.

    Its `hookName` says where it acts. Raises `TrimtabError` if it has no vector, or acts elsewhere than at a block's
    output.
    """
    if not value["vector"]:
        raise TrimtabError(
            "Neuronpedia's response doesn't include the feature's vector; take it from the autoencoder itself: trimtab"
            " convert SAE_FOLDER OUT --feature INDEX"
        )
    hook = value.get("hookName")
    layer = block_named(hook) if isinstance(hook, str) else None
    if layer is None and selection.layer is None:
        raise TrimtabError(
            "Neuronpedia's response doesn't say where its vector acts; pass --layer N to trimtab convert (layer=N)"
        )
    if layer is not None:
        selection.check_unused()
    at = selection.layer if layer is None else layer
    assert at is not None
    known = ("modelId", "layer", "index", "vectorLabel", "vectorDefaultSteerStrength", "maxActApprox")
    about = {key: value[key] for key in known if isinstance(value.get(key), (str, int, float))}
    vector = check_vector(_vector(value["vector"], "its vector").reshape(-1), "its vector")
    return Imported("Neuronpedia", additions({0: vector}, at), about)


def _module(value: Mapping[str, Any]) -> Imported:
    """`{hook: {layer: {vector, scale}}}`, or packed `{hook: {dtype, shape, layer_indices, data, scales}}`."""
    if set(value) != {BLOCK}:
        other = next(hook for hook in value if hook != BLOCK)
        raise TrimtabError(f"it steers at the hook {other[:80]!r}, and only {BLOCK} is a block's output")
    hook = value[BLOCK]
    if "data" in hook:
        return Imported("steering module", additions(_packed(hook)))
    directions = {}
    for key, item in hook.items():
        rows, scale = (item.get("vector"), item.get("scale", 1.0)) if isinstance(item, dict) else (item, 1.0)
        directions[layer_number(key, BLOCK)] = _vector(rows, f"layer {key}").reshape(-1) * _number(scale, "its scale")
    return Imported("steering module", additions(directions))


def _packed(hook: Mapping[str, Any]) -> dict[int, Tensor]:
    shape, layers, dtype, data = (hook.get(name) for name in ("shape", "layer_indices", "dtype", "data"))
    if dtype not in DTYPES:
        raise TrimtabError(f"its vectors are {str(dtype)[:40]!r}; {', '.join(DTYPES)} are read")
    valid_shape = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    if not valid_shape or not isinstance(layers, list) or not isinstance(data, str):
        raise TrimtabError("its packed vectors have no shape [layers, width], layer_indices and data")
    assert isinstance(shape, list)
    if len(layers) != shape[0] or len(set(map(str, layers))) != len(layers):
        raise TrimtabError(
            f"it has {shape[0]} vectors for {len(layers)} layers; it must have one per layer, and each layer once"
        )
    size = prod(shape) * DTYPES[dtype].itemsize
    if size > len(data):
        raise TrimtabError(f"its packed vectors are too short for their shape {shape}")
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise TrimtabError("its packed vectors aren't valid base64") from None
    if len(raw) != size:
        raise TrimtabError(f"its packed vectors have {len(raw)} bytes instead of {size}")
    scales = hook.get("scales") or [1.0] * len(layers)
    if not isinstance(scales, list) or len(scales) != len(layers):
        raise TrimtabError("its packed vectors don't have one scale per layer")
    rows = torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(shape)
    by_layer = {}
    for layer, row, scale in zip(layers, rows, scales, strict=True):
        by_layer[layer_number(layer, BLOCK)] = check_vector(row, f"layer {layer}") * _number(scale, "its scale")
    return by_layer


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TrimtabError(f"{name} is {str(value)[:40]!r}, which isn't a number")
    try:
        return float(value)
    except OverflowError:
        raise TrimtabError(f"{name} is too large a number") from None


def _numbers(rows: Any, name: str, depth: int = 3) -> Tensor:
    """A tensor from nested lists of numbers."""
    if isinstance(rows, list) and rows and depth > 1 and all(isinstance(row, list) for row in rows):
        parts = [_numbers(row, name, depth - 1) for row in rows]
        if len({part.shape for part in parts}) > 1:
            raise TrimtabError(f"{name} has rows of different lengths")
        return torch.stack(parts)
    return _vector(rows, name).reshape(-1)


def _vector(rows: Any, name: str) -> Tensor:
    if not isinstance(rows, list) or not rows:
        raise TrimtabError(f"{name} has no list of numbers")
    flat = [row for row in rows if isinstance(row, list)]
    if flat and len(flat) != len(rows):
        raise TrimtabError(f"{name} mixes numbers and lists")
    if len({len(row) for row in flat}) > 1:
        raise TrimtabError(f"{name} has rows of different lengths")
    numbers = [[_number(n, name) for n in row] for row in (flat or [rows])]
    return torch.tensor(numbers, dtype=torch.float64).float()
