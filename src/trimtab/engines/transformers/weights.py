"""How a model's weights are stored (dense or quantized, in memory or offloaded), and reading some of their values.

accelerate keeps the weights of offloaded modules elsewhere and loads them while a module runs; otherwise the model has
meta tensors in their place. Here they are loaded through the same hooks.
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
"""The number of values of a tensor that are sampled."""
PACKAGES = frozenset(
    {"aqlm", "auto_gptq", "awq", "bitsandbytes", "compressed_tensors", "eetq", "gptqmodel", "hqq", "optimum", "quark"}
    | {"torchao", "vptq"}
)
"""The packages whose modules and tensors store quantized weights."""


def best_device() -> str:
    """The first available device type of CUDA, MPS and CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def sample_values(tensors: Sequence[Tensor]) -> Tensor:
    """A few values of each tensor, on the CPU, in bfloat16 so that the dtype of the weights matters less."""
    by_device: dict[torch.device, list[Tensor]] = {}
    order: list[tuple[torch.device, int]] = []
    for tensor in tensors:
        count = min(SAMPLE, tensor.numel())
        last = tensor.numel() - 1
        where = [i * last // max(1, count - 1) for i in range(count)]  # integers: floats would be inexact
        chosen = tensor.detach().reshape(-1)[where].to(torch.bfloat16)
        here = by_device.setdefault(tensor.device, [])
        order.append((tensor.device, count))
        here.append(chosen)
    each = {device: iter(torch.cat(parts).cpu().split([len(f) for f in parts])) for device, parts in by_device.items()}
    return torch.cat([next(each[device]) for device, _ in order]).contiguous() if order else torch.empty(0)


def embedding_rows(model: Any, chosen: Callable[[int], list[int]]) -> tuple[tuple[int, ...], Tensor]:
    """The shape of the input embeddings, and the rows that `chosen` selects, given the number of rows.

    Raises:
        UnsupportedError: The embeddings are on the meta device, and no hook loads them.
    """
    module = model.get_input_embeddings()
    with in_memory(module):
        weight = getattr(module, "weight", None)
        if weight is None or weight.is_meta:
            raise UnsupportedError(
                f"the embeddings of this {type(model).__name__} have no values (a model on the meta device), and"
                " trimtab identifies a model by them; load its weights first"
            )
        return tuple(weight.shape), weight.detach()[chosen(weight.shape[0])]


def blocks_digest(blocks: Sequence[nn.Module]) -> str | None:
    """A digest of a few weights of each block, without adapters; `None` if the weights are quantized.

    It is the same for a model with and without adapters, and changes when they are merged into the weights.
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
    values = sample_values(tensors)
    return hashlib.sha256(json.dumps(shapes).encode() + values.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _of_adapter(block: nn.Module, name: str) -> bool:
    """Whether a parameter of a block belongs to an adapter that `peft` added."""
    parts = name.split(".")
    for stop in range(len(parts)):
        module = block.get_submodule(".".join(parts[:stop]))
        if parts[stop] in getattr(module, "adapter_layer_names", ()):
            return True
    return False


def is_dense(weight: Any) -> TypeGuard[Tensor]:
    """Whether this is a plain floating-point tensor with values: not quantized and not on the meta device."""
    return (
        isinstance(weight, Tensor)
        and weight.is_floating_point()
        and not weight.is_meta
        and not _is_quantized_tensor(weight)
    )


def _is_quantized_tensor(weight: Tensor) -> bool:
    return _package(weight.data) in PACKAGES or weight.is_quantized


def quantization(model: Any) -> str | None:
    """The quantization method of a model, from its configuration or else its weights; `None` if not quantized."""
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


# ---- weights offloaded by accelerate ------------------------------------------------------------------------------


def _offload_hook(module: nn.Module) -> Any:
    """accelerate's hook that loads a module's weights while it runs; `None` if there is none."""
    hook = getattr(module, "_hf_hook", None)
    for candidate in (hook, *getattr(hook, "hooks", ())):
        if getattr(candidate, "offload", False):
            return candidate
    return None


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are offloaded, and loaded only while their module runs."""
    return any(_offload_hook(module) is not None for module in model.modules())


@contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Load the module's own weights within the context, if they are offloaded."""
    hook = _offload_hook(module)
    if hook is None or not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, torch.empty(0))


def vocabulary_size(model: Any) -> int:
    """The number of logits per token. The weight of a quantized head may not have that shape."""
    head = model.get_output_embeddings()
    count = getattr(head, "out_features", None)
    if isinstance(count, int):
        return count
    weight = getattr(head, "weight", None)
    return int((model.get_input_embeddings().weight if weight is None else weight).shape[0])


def input_device(model: Any) -> torch.device:
    """The device for token ids: the one on which the input embeddings run."""
    return device_of(model.get_input_embeddings())


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module runs: that of its weights, or the one that offloaded weights are loaded to."""
    for parameter in module.parameters():
        if not parameter.is_meta:
            return parameter.device
    for part in module.modules():
        hook = _offload_hook(part)
        if hook is not None:
            return torch.device(hook.execution_device)
    return torch.device("cpu")
