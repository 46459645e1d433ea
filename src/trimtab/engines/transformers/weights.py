"""How a model's weights are held, and reading a few: dense or quantized, in memory or fetched while they are run.

accelerate keeps weights of its offloaded parts elsewhere, and puts them in place while the part runs; what is in the
model meanwhile are tensors without numbers. Here they are fetched through the same hooks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from trimtab.errors import UnsupportedError

SAMPLE = 16
"""How many numbers of a tensor are looked at."""
PACKAGES = frozenset(
    {"aqlm", "auto_gptq", "awq", "bitsandbytes", "compressed_tensors", "eetq", "gptqmodel", "hqq", "optimum", "quark"}
    | {"torchao", "vptq"}
)
"""Whose modules and tensors hold weights in codes."""


def best_device() -> str:
    """The device of the first kind that this machine has, of CUDA's, Apple's and the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def sampled(tensors: Sequence[Tensor]) -> Tensor:
    """A few numbers of each tensor, in bfloat16 so that a change of dtype doesn't matter, on the CPU."""
    by_device: dict[torch.device, list[Tensor]] = {}
    order: list[tuple[torch.device, int]] = []
    for tensor in tensors:
        count = min(SAMPLE, tensor.numel())
        last = tensor.numel() - 1
        where = [i * last // max(1, count - 1) for i in range(count)]  # in floats large numbers would be off
        chosen = tensor.detach().reshape(-1)[where].to(torch.bfloat16)
        here = by_device.setdefault(tensor.device, [])
        order.append((tensor.device, count))
        here.append(chosen)
    each = {device: iter(torch.cat(parts).cpu().split([len(f) for f in parts])) for device, parts in by_device.items()}
    return torch.cat([next(each[device]) for device, _ in order]).contiguous() if order else torch.empty(0)


def embedding_rows(model: Any, chosen: Callable[[int], list[int]]) -> tuple[tuple[int, ...], Tensor]:
    """The shape of the input embeddings, and those of their rows that `chosen` says, given how many there are.

    Raises:
        UnsupportedError: They are nowhere to be had: on the meta device, without a hook that fetches them.
    """
    module = model.get_input_embeddings()
    with in_memory(module):
        weight = getattr(module, "weight", None)
        if weight is None or weight.is_meta:
            raise UnsupportedError(
                f"the embeddings of this {type(model).__name__} have no numbers (a model on the meta device), and"
                " trimtab knows a model by them; load its weights first"
            )
        return tuple(weight.shape), weight.detach()[chosen(weight.shape[0])]


def blocks_digest(blocks: Sequence[nn.Module]) -> str | None:
    """A digest of a few weights of each block, adapters left out; `None` where they aren't held as they were trained.

    It is the same for a model within adapters and without, and another one once they are merged into its weights.
    """
    if any(_package(module) in PACKAGES for block in blocks for module in block.modules()):
        return None
    shapes, tensors = [], []
    for number, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            path = name.replace(".base_layer", "").replace(".original_module", "")
            if parameter.dim() < 2 or _of_adapter(block, name):
                continue
            if not is_dense(parameter):
                return None
            shapes.append([number, path, list(parameter.shape)])
            tensors.append(parameter)
    values = sampled(tensors)
    return hashlib.sha256(json.dumps(shapes).encode() + values.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _of_adapter(block: nn.Module, name: str) -> bool:
    """Whether a parameter of a block is in what `peft` put there beside the model's own weights."""
    parts = name.split(".")
    for stop in range(len(parts)):
        module = block.get_submodule(".".join(parts[:stop]))
        if parts[stop] in getattr(module, "adapter_layer_names", ()):
            return True
    return False


def is_dense(weight: Any) -> TypeGuard[Tensor]:
    """Whether this holds the numbers that it stands for: no codes, no tensor of a quantizing package, not meta."""
    return (
        isinstance(weight, Tensor)
        and weight.is_floating_point()
        and not weight.is_meta
        and not _is_quantized_tensor(weight)
    )


def _is_quantized_tensor(weight: Tensor) -> bool:
    return _package(weight.data) in PACKAGES or weight.is_quantized


def quantization(model: Any) -> str | None:
    """By what method a model's weights are quantized, as it says itself or as they are; `None` where they aren't."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is not None:
        method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
        return str(getattr(method, "value", method or "unknown"))
    for module in model.modules():
        if (package := _package(module)) in PACKAGES:
            return package
        for parameter in module.parameters(recurse=False):
            if _is_quantized_tensor(parameter):
                return _package(parameter.data)
            if not parameter.is_floating_point():
                return "unknown"
    return None


def _package(thing: Any) -> str:
    return type(thing).__module__.split(".")[0]


# ---- what accelerate keeps elsewhere ------------------------------------------------------------------------------


def _fetching(module: nn.Module) -> Any:
    """The hook of accelerate's that puts a module's weights in place while it runs; `None` where there is none."""
    hook = getattr(module, "_hf_hook", None)
    for candidate in (hook, *getattr(hook, "hooks", ())):
        if getattr(candidate, "offload", False):
            return candidate
    return None


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are fetched only while their part of the model runs."""
    return any(_fetching(module) is not None for module in model.modules())


@contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """While open, the module's own weights are in place, as while it runs."""
    hook = _fetching(module)
    if hook is None or not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, torch.empty(0))


def vocabulary_size(model: Any) -> int:
    """How many logits the model gives a token. A quantized head may hold no weight of that shape."""
    head = model.get_output_embeddings()
    count = getattr(head, "out_features", None)
    if isinstance(count, int):
        return count
    weight = getattr(head, "weight", None)
    return int((model.get_input_embeddings().weight if weight is None else weight).shape[0])


def input_device(model: Any) -> torch.device:
    """The device that token ids are put on: that of the input embeddings, or on which they are run."""
    return device_of(model.get_input_embeddings())


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where they are put while it runs."""
    for parameter in module.parameters():
        if not parameter.is_meta:
            return parameter.device
    for part in module.modules():
        hook = _fetching(part)
        if hook is not None:
            return torch.device(hook.execution_device)
    return torch.device("cpu")
