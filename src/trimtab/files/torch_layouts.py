"""Vectors in `.pt` files: of EasyEdit2, rotalabs, hotwire, hidden-directions, vLLM-Hook, lm-eval, and others.

The files contain tensors and little else. The program that wrote one is recognized by its structure; `tensor_layout`
handles bare tensors.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.files.atomic_write import write_atomically
from trimtab.files.foreign import Imported, check_plain, check_vector, sum_additions
from trimtab.files.named_layout import named_layout, named_tensors
from trimtab.files.tensor_layout import FEATURES, NAMED_LAYER, OUTPUT_NAME, Selection, layer_of, tensor_layout
from trimtab.files.torch_file import read_torch_file
from trimtab.steering import Ablate, Add, Operation, SetProjection, Steering

HOOKPOINT = re.compile(r"(?:[A-Za-z_]+\.)*(?:layers|h|blocks|layer)\.(0|[1-9][0-9]{0,5})")
UNIT = 1e-3


def read_torch_layout(path: Path, selection: Selection) -> Imported:
    """The directions in a `.pt` file. `selection` says where a single vector acts, or which of several is meant.

    Raises `TrimtabError` if it isn't clear what the tensors are, or where they act.
    """
    value = read_torch_file(path)
    if isinstance(value, Mapping) and value and all(_is_hook(item) for item in value.values()):
        selection.check_unused()
        return _lm_eval(value)
    if isinstance(value, Mapping) and "dir" in value:
        selection.check_no_row()
        return _vllm_hook(value, layer_of(path, selection)[0])
    if isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values()):
        return _named(value, path, selection)
    if not isinstance(value, Tensor):
        keys = f" with the keys {', '.join(map(repr, list(value)[:6]))}" if isinstance(value, Mapping) else ""
        raise TrimtabError(f"it holds a {type(value).__name__}{keys}, which isn't a known layout of steering vectors")
    return tensor_layout(value, path, selection)


def read_torch_folder(path: Path) -> Imported:
    """A folder of `layer_<N>.pt` files with one vector each, as EasyEdit2 writes it."""
    files = {int(match[1]): file for file in path.iterdir() if (match := NAMED_LAYER.fullmatch(file.stem))}
    files = {layer: file for layer, file in files.items() if file.suffix == ".pt"}
    if not files and (path / "sae_weights.safetensors").is_file():
        raise TrimtabError(FEATURES.format(path=quote(str(path)), new=OUTPUT_NAME))
    if not files:
        raise TrimtabError("it is a folder without layer_<N>.pt files")
    operations: list[tuple[int, Operation]] = []
    for layer in sorted(files):
        operations.append((layer, Add(check_vector(read_torch_file(files[layer]), files[layer].name))))
    return Imported("folder of layers", tuple(operations))


def _named(value: Mapping[Any, Any], path: Path, selection: Selection) -> Imported:
    """A dict of tensors, and of numbers and texts that describe them."""
    others = {str(key): item for key, item in value.items() if not isinstance(item, Tensor)}
    for key, item in others.items():
        if not isinstance(item, (str, int, float, type(None))):
            raise TrimtabError(
                f"it holds tensors and, under {key[:60]!r}, a {type(item).__name__}, which isn't supported"
            )
    tensors = {key: item for key, item in value.items() if isinstance(item, Tensor)}
    return named_layout(named_tensors(tensors, others, "tensor"), path, selection)


def _is_hook(item: Any) -> bool:
    return isinstance(item, Mapping) and "steering_vector" in item and "action" in item


def _lm_eval(value: Mapping[Any, Any]) -> Imported:
    """lm-eval's steered models: hook points, each with an action."""
    operations: list[tuple[int, Operation]] = []
    for name, item in value.items():
        match = HOOKPOINT.fullmatch(str(name))
        if match is None:
            raise TrimtabError(f"its hook point {str(name)[:80]!r} isn't the output of a block (layers.N)")
        if item.get("head_index") is not None or item.get("bias") is not None:
            raise TrimtabError(f"its hook point {name} has a head or a bias, which isn't supported")
        vector = check_vector(item["steering_vector"], f"the hook point {name}")
        factor = item.get("steering_coefficient", 1.0)
        if isinstance(factor, Tensor) and factor.numel() == 1:
            factor = factor.item()
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise TrimtabError(f"its hook point {name} has the coefficient {factor!r}, which isn't a number")
        if item["action"] == "add":
            operations.append((int(match[1]), Add(vector * factor)))
        elif item["action"] == "clamp":
            if not float(vector.norm()) > 0:
                raise TrimtabError(f"its hook point {name} clamps along a vector of zeros")
            operations.append((int(match[1]), SetProjection(vector / vector.norm(), float(factor))))
        else:
            raise TrimtabError(f"its hook point {name} has the action {str(item['action'])[:40]!r}, not add or clamp")
    return Imported("lm-eval", tuple(sorted(operations, key=lambda operation: operation[0])))


def _vllm_hook(value: Mapping[Any, Any], layer: int) -> Imported:
    """vLLM-Hook's `{dir, avg_proj}`: sets the projection on `dir` to `avg_proj`, or adds `dir` if there is none."""
    direction = check_vector(value["dir"], "its dir")
    target = value.get("avg_proj")
    if target is None:
        return Imported("vLLM-Hook", ((layer, Add(direction)),))
    if abs(float(direction.double().norm()) - 1) > UNIT:
        raise TrimtabError(
            f"its dir has the norm {float(direction.norm()):.4g}, but vLLM-Hook uses it as a unit vector; divide it"
            " by its norm, and avg_proj too"
        )
    number = float(target.reshape(-1)[0]) if isinstance(target, Tensor) and target.numel() == 1 else target
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TrimtabError("its avg_proj isn't a number")
    return Imported("vLLM-Hook", ((layer, SetProjection(direction, float(number))),))


def write_lm_eval(steering: Steering, path: Path, blocks: str = "layers") -> None:
    """Write a steering for `lm_eval --model steered --model_args steer_path=…`, one hook point per block.

    It adds, or sets one projection per block, at every token. `blocks` is the attribute of the model's `base_model`
    that contains its blocks (`h` for GPT-2). Raises `UnsupportedError` for anything else.
    """
    hooks: dict[str, dict[str, Any]] = {}
    target = "lm-eval"
    clamps = [edit for edit in steering.edits if isinstance(edit.operation, (SetProjection, Ablate))]
    for edit in clamps:
        check_plain(edit, target)
        if edit.site.kind != "residual" or edit.strength != 1 or getattr(edit.operation, "one_sided", False):
            raise UnsupportedError(
                f"{target} sets whole, two-sided projections of the residual stream only, not {edit}"
            )
        name = f"{blocks}.{edit.site.layer}"
        if sum(other.site == edit.site for other in steering.edits) > 1:
            raise UnsupportedError(
                f"{target} takes one operation per block, but this steering has several at {edit.site}"
            )
        number = float(getattr(edit.operation, "target", 0.0))
        hooks[name] = _hook("clamp", edit.operation.direction.float(), number)
    if len(clamps) < len(steering.edits) or not clamps:
        rest = Steering(tuple(edit for edit in steering.edits if edit not in clamps), steering.card)
        hooks |= {f"{blocks}.{site.layer}": _hook("add", v, 1.0) for site, v in sum_additions(rest, target).items()}
    buffer = io.BytesIO()
    torch.save(hooks, buffer)
    write_atomically(path, buffer.getvalue())


def write_torch(steering: Steering, path: Path) -> None:
    """Write `{"layer_<N>": [width]}` for `torch.load`: what is added at the output of block N, strengths folded in.

    Raises `UnsupportedError` for anything but additions at every token.
    """
    buffer = io.BytesIO()
    sums = sum_additions(steering, "a file of tensors")
    torch.save({f"layer_{site.layer}": vector for site, vector in sums.items()}, buffer)
    write_atomically(path, buffer.getvalue())


def _hook(action: str, vector: Tensor, coefficient: float) -> dict[str, Any]:
    return {
        "action": action,
        "steering_vector": vector.contiguous().clone(),
        "steering_coefficient": coefficient,
        "bias": None,
        "head_index": None,
    }
