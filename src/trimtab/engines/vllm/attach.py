"""Attach the operator to the sites of a model that vLLM has loaded, before it is compiled."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.engines.vllm.operator import define, place_of
from trimtab.errors import UnsupportedError
from trimtab.steering import Site

PARTS = ("heads", "neurons", "attention", "mlp")
"""The kinds of sites at the linear layers that end attention and MLP."""
INSIDE = (*PARTS, "keys")
"""The kinds of sites inside a block."""
PLACE = "trimtab_place"


def find_blocks(model: Any, count: int) -> dict[int, nn.Module]:
    """The blocks by layer; under pipeline parallelism, this worker's blocks.

    They are the only list of `count` items in the language model that are all blocks, apart from placeholders. Raises
    `UnsupportedError`, naming the candidates, if there is no such list or more than one.
    """
    inner = model.get_language_model() if hasattr(model, "get_language_model") else model
    lists: dict[str, dict[int, nn.Module]] = {}
    for name, module in inner.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            present = {i: item for i, item in enumerate(module) if type(item).__name__ != "PPMissingLayer"}
            if present and all(_is_block(item) for item in present.values()):
                lists[name] = present
    if len(lists) != 1:
        names = ", ".join(lists) or "none"
        raise UnsupportedError(
            f"can't tell which part of {type(model).__name__} holds its {count} blocks; lists of that length: {names}"
        )
    return next(iter(lists.values()))


def _is_block(module: nn.Module) -> bool:
    """Whether a module has several submodules; lists with one norm or one projection per layer don't qualify."""
    return sum(1 for _ in module.children()) > 1


@dataclass(frozen=True, eq=False)
class Place:
    """A module with a site at its input (`at_input`) or its output, and the width of the activations there.

    At an attention module, the site is the second input, the keys. If activations are split over tensor-parallel
    workers, this worker has `width` of `whole`.
    """

    module: nn.Module
    width: int
    at_input: bool = False
    whole: int = 0


def find_places(
    blocks: Mapping[int, nn.Module], width: int, kinds: Collection[str], key_heads: int = 0
) -> dict[Site, Place]:
    """The locations of the sites of these kinds, and of the residual stream after each block.

    Args:
        blocks: By layer.
        width: The width of the residual stream.
        kinds: A subset of `INSIDE`.
        key_heads: The number of key heads over all workers; 0: as many as this worker has.

    Raises:
        UnsupportedError: A block doesn't consist of one attention and one MLP, each ending with a linear layer whose
            input is split over workers; or keys are requested and a block stores no keys of its own, or of another
            width than the other blocks.
    """
    places: dict[Site, Place] = {}
    for layer, block in blocks.items():
        inside = _inside(layer, block, width) if set(kinds) & set(PARTS) else {}
        if "keys" in kinds:
            inside["keys"] = _keys(layer, block, key_heads)
        places |= {Site(layer, kind): inside[kind] for kind in INSIDE if kind in kinds}
        places[Site(layer)] = Place(block, width)
    if len(sizes := {place.width for site, place in places.items() if site.kind == "keys"}) > 1:
        raise UnsupportedError(
            f"the keys of this model's blocks have several widths ({', '.join(map(str, sorted(sizes)))}), and only one"
            " is supported; leave keys out of TRIMTAB_SITES"
        )
    return places


def _inside(layer: int, block: nn.Module, width: int) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for name, part in block.named_children():
        last = [m for m in part.modules() if type(m).__name__ == "RowParallelLinear"]
        if not last:
            continue
        attends = any(type(module).__name__.endswith("Attention") for module in part.children())
        kinds = ("heads", "attention") if attends else ("neurons", "mlp")
        if len(last) > 1 or kinds[0] in places:
            raise UnsupportedError(
                f"can't find the sites inside block {layer} of this model: {name} isn't a single attention or MLP"
            )
        linear: Any = last[0]
        places[kinds[0]] = Place(linear, linear.input_size_per_partition, True, linear.input_size)
        places[kinds[1]] = Place(part, width)
    if len(places) < len(PARTS):
        here = ", ".join(places) or "none of them"
        raise UnsupportedError(f"can't find the sites inside block {layer} of this model, which has {here}")
    return places


def _keys(layer: int, block: nn.Module, key_heads: int) -> Place:
    """The attention module that receives a block's keys: projected, normalized and rotated, as they are cached."""
    attentions: list[Any] = [m for m in block.modules() if "Attention" in {base.__name__ for base in type(m).__mro__}]
    attentions = [m for m in attentions if all(hasattr(m, name) for name in ("num_kv_heads", "head_size"))]
    if len(attentions) != 1 or getattr(attentions[0], "kv_sharing_target_layer_name", None):
        what = (
            "shares its keys with another block"
            if len(attentions) == 1
            else f"has {len(attentions)} attentions over keys"
        )
        raise UnsupportedError(f"can't steer keys in block {layer} of this model, which {what}")
    heads, size = attentions[0].num_kv_heads, attentions[0].head_size
    return Place(attentions[0], heads * size, True, max(heads, key_heads) * size)


def attach(places: Mapping[Site, Place], manager: int, *, adds_only: Collection[Site] = ()) -> None:
    """Register the operator at each site.

    It takes the tensor at the site, or after a block the pair whose sum is the residual stream. Additions only need the
    first tensor of a pair (at the sites `adds_only`). If the operator also received the second one, the compiler would
    have to keep that in memory, in the model's dtype, where it would otherwise have kept a sum in float32.
    """
    define()
    for number, (site, place) in enumerate(places.items()):
        place.module.register_buffer(PLACE, place_of(manager, number), persistent=False)
        if site.kind == "keys":
            place.module.register_forward_pre_hook(_steer_keys)
        elif place.at_input:
            place.module.register_forward_pre_hook(_steer_input)
        elif site.kind != "residual":
            place.module.register_forward_hook(_steer_part_output)
        else:
            place.module.register_forward_hook(_add_to_output if site in adds_only else _steer_output)


def _steer_output(block: nn.Module, _args: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        torch.ops.trimtab.steer(output, None, getattr(block, PLACE))
    elif isinstance(output, tuple) and len(output) == 2:
        torch.ops.trimtab.steer(output[0], output[1], getattr(block, PLACE))
    else:
        raise UnsupportedError("this model's blocks return neither a tensor nor a pair; trimtab can't steer it")


def _add_to_output(block: nn.Module, args: Any, output: Any) -> None:
    _steer_output(block, args, output[0] if isinstance(output, tuple) and len(output) == 2 else output)


def _steer_input(linear: nn.Module, args: Any) -> None:
    if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        raise UnsupportedError(
            "this model's projections don't take plain activation tensors; trimtab can't steer there"
        )
    torch.ops.trimtab.steer(args[0], None, getattr(linear, PLACE))


def _steer_keys(attention: nn.Module, args: Any) -> None:
    """Attention receives queries, keys and values as `[tokens, heads * size]`, or `[tokens, heads, size]`."""
    if len(args) < 3 or not isinstance(args[1], Tensor) or not args[1].is_floating_point():
        raise UnsupportedError(
            "this model's attention doesn't take its keys as plain tensors; trimtab can't steer them"
        )
    keys = args[1]
    torch.ops.trimtab.steer(keys if keys.dim() == 2 else keys.flatten(1), None, getattr(attention, PLACE))


def _steer_part_output(part: nn.Module, _args: Any, output: Any) -> None:
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor):
        raise UnsupportedError("a part of this model's blocks doesn't return a tensor; trimtab can't steer there")
    torch.ops.trimtab.steer(first, None, getattr(part, PLACE))
