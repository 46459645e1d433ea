"""Rewrite a model folder one shard at a time, with its tensors changed as planned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimtab.baking.affine import Affine
from trimtab.baking.plan import FIRST, Plan
from trimtab.baking.structure import Structure
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Site

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
COPIED = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".md", ".vocab", ".bpe")
COPIED_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
WRITTEN = ("README.md", "trimtab.json", "config.json", INDEX)
TIED = "tie_word_embeddings"
PARTS = ("text_config", "llm_config", "language_config")
"""The name of the language model's section in the configuration of a composite model."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Shards:
    """The safetensors files of a model folder, and the tensors in each."""

    folder: Path
    names: tuple[str, ...]
    index: Mapping[str, Any] | None

    @contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        """Open one file to read tensors from. Raises `TrimtabError` if it is damaged."""
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise TrimtabError(f"{self.folder / name} is cut short or damaged: {error}; get a fresh copy") from None


@dataclass
class Counted:
    """The changes so far: numbers of weights by site, the names of new tensors, and the file of each tensor."""

    numbers: dict[Site, int] = field(default_factory=dict)
    new: set[str] = field(default_factory=set)
    files: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    changed: int = 0


def find_shards(folder: Path) -> Shards:
    """The shards of a model folder.

    Raises:
        TrimtabError: The folder has no safetensors weights, some of them are missing, or the index is damaged.
    """
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_bytes())
            names = tuple(sorted({str(name) for name in index["weight_map"].values()}))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise TrimtabError(f"{folder / INDEX} is damaged; get a fresh copy of the model") from None
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise TrimtabError(f"{folder} has no file {name!r}, which its index names; get the complete model")
        return Shards(folder, names, index)
    if (folder / SINGLE).is_file():
        return Shards(folder, (SINGLE,), None)
    raise TrimtabError(
        f"{folder} has no {SINGLE} and no {INDEX}; trimtab changes weights in safetensors files only: load the model"
        " with transformers, save it with save_pretrained, and bake that folder"
    )


def write_shards(shards: Shards, folder: Path, structure: Structure, plan: Plan, progress: Any = None) -> Counted:
    """Write all shards into `folder`, changed as planned, with one shard in memory at a time.

    Args:
        shards: The original shards.
        folder: Where the new ones are written, under the same names.
        structure: The structure of the model.
        plan: The maps and the new biases.
        progress: Called after each shard with the number of shards done and their total.

    Returns:
        What was changed.

    Raises:
        TrimtabError: A tensor that should be changed is missing or has another shape than in the model, or a file is
            damaged.
        UnsupportedError: A tensor is quantized, or its role is unknown.
    """
    counted = Counted()
    for done, name in enumerate(shards.names):
        tensors: dict[str, Tensor] = {}
        with shards.opened(name) as file:
            metadata = file.metadata() or {"format": "pt"}
            for key in file.keys():  # noqa: SIM118
                for new, tensor in _bake_tensor(key, file.get_tensor(key), structure, plan, counted):
                    tensors[new] = tensor.contiguous()
        counted.files |= dict.fromkeys(tensors, name)
        counted.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        save_file(tensors, folder / name, metadata)
        if progress is not None:
            progress(done + 1, len(shards.names))
    for site in plan.maps:
        if counted.numbers.get(site, 0) != structure.element_count(site):
            raise TrimtabError(
                f"{shards.folder} has {counted.numbers.get(site, 0)} known weights that write at {site}, and"
                f" {structure.name} has {structure.element_count(site)}; its tensors have names that trimtab doesn't"
                " know"
            )
    if missing := sorted(plan.biases - counted.new):
        raise TrimtabError(f"{shards.folder} has no weight that the bias {missing[0]} belongs to")
    if shards.index is not None:
        index_metadata = {**shards.index.get("metadata", {}), "total_size": counted.bytes}
        document = {**shards.index, "metadata": index_metadata, "weight_map": counted.files}
        (folder / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return counted


def _bake_tensor(
    key: str, tensor: Tensor, structure: Structure, plan: Plan, counted: Counted
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that replace one tensor of the checkpoint: itself or a changed one, sometimes with a new one."""
    writer = structure.writer(key, tensor.dim())
    untied = structure.tied and FIRST in plan.maps
    if untied and structure.model_key(key) == structure.head:
        return  # a copy of the embeddings that a tied model doesn't load
    name = structure.model_key(key)
    if writer is not None and (affine := plan.maps.get(writer.site)) is not None:
        if untied and name == structure.input_embeddings:
            yield structure.head, tensor
        if tensor.dtype not in FLOATS:
            raise UnsupportedError(f"{key} is stored as {tensor.dtype}, quantized; bake the unquantized model")
        old, tensor = tensor, _apply_map(key, tensor, affine, writer.bias, writer.transposed)
        if not writer.bias:
            counted.numbers[writer.site] = counted.numbers.get(writer.site, 0) + tensor.numel()
        counted.changed += not torch.equal(old, tensor)
    yield key, tensor
    if (bias := name.removesuffix("weight") + "bias") in plan.biases:
        counted.new.add(bias)
        offset = torch.zeros(len(tensor))
        if writer is not None and (affine := plan.maps.get(writer.site)) is not None:
            offset = affine.offset
        yield key.removesuffix("weight") + "bias", _check_finite(key, offset.to(tensor.dtype))


def _apply_map(key: str, tensor: Tensor, affine: Affine, bias: bool, transposed: bool | None) -> Tensor:
    """The tensor with the map applied to its output, in its own dtype."""
    width = affine.width
    if bias:
        if tensor.shape[-1] != width:
            raise _shape_error(key, tensor, width)
        return _check_finite(
            key, affine.apply(tensor).to(tensor.dtype) if tensor.dim() == 1 else affine.apply_linear(tensor)
        )
    if transposed is None:
        if (tensor.shape[-1] == width) == (tensor.shape[-2] == width):
            raise UnsupportedError(
                f"trimtab doesn't know which dimension of {key} {list(tensor.shape)} is the residual stream's"
            )
        transposed = tensor.shape[-1] == width
    if tensor.shape[-1 if transposed else -2] != width:
        raise _shape_error(key, tensor, width)
    new = torch.empty_like(tensor)
    experts = [(tensor, new)] if tensor.dim() == 2 else list(zip(tensor, new, strict=True))
    for old, out in experts:
        out.copy_(affine.apply_linear(old) if transposed else affine.apply_linear(old.T).T)
    return _check_finite(key, new)


def _check_finite(key: str, tensor: Tensor) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise TrimtabError(f"{key} would hold numbers that are infinite or NaN in {kind}; lower the strength")
    return tensor


def _shape_error(key: str, tensor: Tensor, width: int) -> TrimtabError:
    return TrimtabError(
        f"{key} has shape {list(tensor.shape)}, and no dimension is the residual stream's, which has width {width}"
    )


def copy_rest(source: Path, folder: Path, shards: Shards) -> list[str]:
    """Copy tokenizer, configurations, code and license; returns the names of the files and folders left out."""
    skipped = []
    for path in sorted(source.iterdir()):
        if path.name in WRITTEN or path.name in shards.names or path.name.startswith("."):
            continue
        if path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, folder / path.name)
        elif path.is_file() and (path.suffix in COPIED or path.stem.upper() in COPIED_NAMES):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
        else:
            skipped.append(path.name)
    return skipped


def edit_config(source: Path, folder: Path, changes: Mapping[str, Any], composite: bool) -> None:
    """Write `config.json` with these changes; in a composite model they go into the language model's section.

    Raises `UnsupportedError` if that section isn't found.
    """
    config: dict[str, Any] = json.loads((source / "config.json").read_bytes())
    if composite:
        name = next((name for name in PARTS if isinstance(config.get(name), dict)), None)
        if name is None:
            raise UnsupportedError(
                f"{source / 'config.json'} has no language model under {', '.join(PARTS)}, so trimtab doesn't know"
                " where its settings are; save only the language model, and bake that"
            )
        config[name] |= changes
        changes = {key: value for key, value in changes.items() if key == TIED}
    config |= changes
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
