"""The `peft` adapters (LoRA and others) that are active in a model: their names, and a digest of their weights.

An adapter changes the model but not its embeddings, so a fingerprint of the embeddings can't detect it. Adapters are
found through the layers that `peft` inserts into a model, whether by `PeftModel`, by transformers' `model.load_adapter`
or in place. Adapters can be switched on and off while a model is in use, so they are looked up on every call; the
digest is reused as long as the weights haven't changed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.engines.transformers.weights import sample_values
from trimtab.errors import UnsupportedError
from trimtab.steering.card import Adapter

_known: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, str]]] = WeakKeyDictionary()
"""For each model and adapter: the key of the digest (the tensors and their versions), and the digest."""


def active_adapters(model: nn.Module) -> tuple[Adapter, ...]:
    """The adapters that are active in the model, sorted by name, including merged ones that are still recognizable."""
    if "peft" not in sys.modules:  # a model with an adapter implies that peft was imported
        return ()
    by_name: dict[str, list[tuple[str, float, Tensor]]] = {}
    for path, layer in _layers(model):
        for name in _active_adapter_names(layer):
            parts = list(_tensors(layer, name))
            if parts:
                scale = _scale(layer, name)
                by_name.setdefault(name, []).extend((f"{path}.{part}", scale, tensor) for part, tensor in parts)
    return tuple(Adapter(name, _digest(model, name, by_name[name])) for name in sorted(by_name))


def check_adapters(model: nn.Module) -> None:
    """Raises `UnsupportedError` for adapters that insert virtual tokens before a text, which shifts positions."""
    config = getattr(model, "active_peft_config", None)
    if config is not None and getattr(config, "is_prompt_learning", False):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UnsupportedError(
            f"the adapter of this {type(model).__name__} ({kind}) inserts its own tokens before every text, so"
            " positions can't be determined; pass the model without it (model.get_base_model())"
        )


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether this is a `peft` module that replaces one of the model's own."""
    return hasattr(module, "adapter_layer_names") and hasattr(module, "active_adapters")


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if is_adapter_layer(module):
            yield path.removeprefix("base_model.model."), module


def _active_adapter_names(layer: Any) -> list[str]:
    """The adapters that change a layer's output: those merged into it, otherwise those that are switched on."""
    merged = list(getattr(layer, "merged_adapters", ()))
    if merged:
        return merged
    if getattr(layer, "disable_adapters", False):
        return []
    active = layer.active_adapters
    return [active] if isinstance(active, str) else list(active)


def _tensors(layer: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The weights that a layer has for an adapter, with their names."""
    for kind in layer.adapter_layer_names:
        by_adapter = getattr(layer, kind, None)
        if by_adapter is None or name not in by_adapter:
            continue
        part = by_adapter[name]
        if isinstance(part, Tensor):
            yield kind, part
        elif isinstance(part, nn.Module):
            yield from ((f"{kind}.{path}", tensor) for path, tensor in part.named_parameters())


def _scale(layer: Any, name: str) -> float:
    scales = getattr(layer, "scaling", None)
    value = scales.get(name) if isinstance(scales, dict) else None
    return float(value) if isinstance(value, (int, float)) else 1.0


def _digest(model: nn.Module, name: str, parts: list[tuple[str, float, Tensor]]) -> str:
    versions = [(id(tensor), tensor.data_ptr(), scale, _version(tensor)) for _, scale, tensor in parts]
    kept = _known.setdefault(model, {})
    if name in kept and kept[name][0] == versions:
        return kept[name][1]
    described = json.dumps([[path, scale, list(tensor.shape)] for path, scale, tensor in parts])
    values = sample_values([tensor for _, _, tensor in parts])
    digest = hashlib.sha256(described.encode() + values.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    kept[name] = versions, digest
    return digest


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; -1 for inference tensors, which don't count it."""
    return -1 if tensor.is_inference() else tensor._version
