"""The operator put behind each block of a model that vLLM has loaded, before it is compiled."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.engines.vllm.operator import define, place_of
from trimtab.errors import UnsupportedError


def find_blocks(model: Any, count: int) -> dict[int, nn.Module]:
    """The blocks by layer; under pipeline parallelism, those that this worker has.

    They are the one list of `count` items, of one class but for placeholders, in the language model. Raises
    `UnsupportedError`, naming the candidates, where that leaves none or several.
    """
    inner = model.get_language_model() if hasattr(model, "get_language_model") else model
    found: dict[str, dict[int, nn.Module]] = {}
    for name, module in inner.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            present = {i: item for i, item in enumerate(module) if type(item).__name__ != "PPMissingLayer"}
            if present and all(_is_block(item) for item in present.values()):
                found[name] = present
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise UnsupportedError(
            f"can't tell which part of {type(model).__name__} holds its {count} blocks; lists of that length: {names}"
        )
    return next(iter(found.values()))


def _is_block(module: nn.Module) -> bool:
    """A block has parts of its own; lists of single norms or projections, one a layer, don't."""
    return sum(1 for _ in module.children()) > 1


PLACE = "trimtab_place"


def attach(blocks: dict[int, nn.Module], rig: int, *, adds_only: Collection[int] = ()) -> None:
    """Let the operator act on what each block puts out: a tensor, or a pair of tensors whose sum is the stream.

    To add, it needs the first of the two alone (at the layers `adds_only`). One that is shown the other as well makes
    the compiler keep that in memory, in the model's dtype, where it would have kept a sum in float32 for itself.
    """
    define()
    for layer, block in blocks.items():
        block.register_buffer(PLACE, place_of(rig, layer), persistent=False)
        block.register_forward_hook(_adding if layer in adds_only else _steering)


def _steering(block: nn.Module, _args: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        torch.ops.trimtab.steer(output, None, getattr(block, PLACE))
    elif isinstance(output, tuple) and len(output) == 2:
        torch.ops.trimtab.steer(output[0], output[1], getattr(block, PLACE))
    else:
        raise UnsupportedError("this model's blocks put out neither a tensor nor a pair; trimtab can't steer it")


def _adding(block: nn.Module, args: Any, output: Any) -> None:
    _steering(block, args, output[0] if isinstance(output, tuple) and len(output) == 2 else output)
