"""Routers of mixtures of experts: finding a block's router, editing its logits, and computing the experts it chooses.

A router in transformers is a module that multiplies a token's activation by its weight `[experts, width]` and selects
experts by these logits, by softmax or sigmoid, with biases and groups depending on the model family. The logits are
internal. So the linear map is intercepted while the router's forward runs, and its output is edited before experts are
selected. Exactly one such linear map must occur; a family that computes its logits differently raises an error when it
runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.adapters import is_adapter_layer
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.weights import device_of
from trimtab.errors import TrimtabError, UnsupportedError

LogitsEdit = Callable[[Tensor], Tensor | None]

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""Names of the number of routed experts in configurations."""
ROUTER_CLASS_NAME = re.compile(r"(Router|Gate|Gating)$")
"""Class names of routers, for models that don't declare their class."""
PRODUCTS: set[Any] = {torch.nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


@dataclass(frozen=True)
class Router:
    """A block's router.

    `source` is the module whose linear map computes the logits: the router itself, or a linear layer whose output the
    logits are (`outputs_logits`). `experts` is the number of experts, `width` the width of the router's input.
    """

    module: nn.Module
    source: nn.Module
    experts: int
    width: int

    @property
    def outputs_logits(self) -> bool:
        return self.source is not self.module or type(self.source) is nn.Linear


def router_of(layout: Layout, layer: int) -> Router:
    """A block's router.

    Raises:
        UnsupportedError: The block has no router or several, or the router's weight can't be identified.
    """
    block, name = layout.blocks[layer], type(layout.decoder).__name__
    routers = _routers(layout, block)
    if len(routers) != 1:
        what = "no router" if not routers else f"{len(routers)} routers ({', '.join(routers)})"
        raise UnsupportedError(
            f"block {layer} of {name} has {what}: only a mixture of experts with a single router in the block has a"
            f" site router[{layer}]"
        )
    ((path, module),) = routers.items()
    if any(is_adapter_layer(part) for part in module.modules()):
        raise UnsupportedError(
            f"an adapter is part of the router of block {layer}, {path}: the router's logits can't be determined"
        )
    counts = _counts(layout)
    maps: list[tuple[nn.Module, tuple[int, ...]]] = []
    for part in module.modules():
        own = part.__dict__["_parameters"].get("weight")
        if own is not None and own.dim() == 2 and own.shape[0] in counts:
            maps.append((part, tuple(own.shape)))
    if len(maps) != 1:
        raise UnsupportedError(
            f"{type(module).__name__}, the router of block {layer} of {name}, has {len(maps)} weights that could"
            " produce the logits of its experts; steer the residual stream, or the block's mlp"
        )
    ((source, (experts, width)),) = maps
    return Router(module, source, experts, width)


def _routers(layout: Layout, block: nn.Module) -> dict[str, nn.Module]:
    """The block's routers by path: modules of the class that the model declares, or else found by their names."""
    kinds = compat.declared(layout.decoder, "router_logits")
    parts: dict[str, nn.Module] = {path: part for path, part in block.named_modules() if path}
    routers: dict[str, nn.Module] = {path: part for path, part in parts.items() if kinds and isinstance(part, kinds)}
    if not routers or any(type(part) is nn.Linear for part in routers.values()):
        counts = _counts(layout)
        routers = {
            path: part
            for path, part in parts.items()
            if path.split(".")[-1] in ("router", "gate")
            and (
                ROUTER_CLASS_NAME.search(type(part).__name__)
                or (type(part) is nn.Linear and part.out_features in counts)
            )
        }
    return routers


def _counts(layout: Layout) -> set[int]:
    """The numbers of experts that the configuration or one of its sub-configurations declares."""
    config: Any = layout.decoder.config
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "to_dict"))]
    counts = (getattr(part, name, None) for part in parts for name in COUNTS)
    return {count for count in counts if isinstance(count, int) and count > 1}


class _RouterDone(BaseException):
    """Raised after a router has run, to skip its experts. Raised in the calling thread only."""


def _router_output(block: nn.Module, router: Router, x: Tensor) -> Any:
    """The output of a router for `x` `[tokens, width]`, called by its parent module as usual.

    If the router returns only logits, the parent's `route_tokens_to_experts` selects the experts.
    """
    parent: Any = next(part for part in block.modules() if any(child is router.module for child in part.children()))
    outputs: list[Any] = []

    def end(_module: Any, _args: Any, output: Any) -> None:
        outputs.append(output)
        raise _RouterDone

    with suppress(_RouterDone), router.module.register_forward_hook(end):
        parent(x[None])
    outside = getattr(parent, "route_tokens_to_experts", None)
    return outside(outputs[0]) if isinstance(outputs[0], Tensor) and outside is not None else outputs[0]


# ---- intercepting the linear map -----------------------------------------------------------------------------------

_edits: WeakKeyDictionary[nn.Module, list[LogitsEdit]] = WeakKeyDictionary()
"""The edits of each router's logits, in order."""


class LogitsHook:
    """Applies an edit to a router's logits until it is removed."""

    def __init__(self, router: Router, edit: LogitsEdit) -> None:
        self._module, self._edit = router.module, edit
        if router.module not in _edits:
            _edits[router.module] = []
            self._wrap_forward(router)
        _edits[router.module].append(edit)

    def remove(self) -> None:
        edits = _edits.get(self._module, [])
        if self._edit in edits:
            edits.remove(self._edit)
        if not edits and self._module in _edits:
            del _edits[self._module]
            forward: Any = self._module.forward
            if forward.before is None:
                del self._module.forward
            else:
                self._module.forward = forward.before

    @staticmethod
    def _wrap_forward(router: Router) -> None:
        module = router.module
        forward, edits = module.forward, _edits[module]

        def edited_forward(*args: Any, **kwargs: Any) -> Any:
            listener = _LogitsEditor(router, edits)
            with listener:
                output = forward(*args, **kwargs)
            if listener.map_count != 1:
                raise UnsupportedError(
                    f"{type(module).__name__} computes its logits in {listener.map_count} linear maps instead of one,"
                    " so they can't be steered or read; steer the residual stream, or the block's mlp"
                )
            return output

        edited_forward.before = vars(module).get("forward")  # type: ignore[attr-defined]
        module.forward = edited_forward


class _LogitsEditor(TorchFunctionMode):
    """Within the context, applies the edits to the output of the router's linear map."""

    def __init__(self, router: Router, edits: list[LogitsEdit]) -> None:
        super().__init__()
        self.router, self.edits, self.map_count = router, edits, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in PRODUCTS or not isinstance(result, Tensor) or result.shape[-1:] != (self.router.experts,):
            return result
        if len(args) < 2 or args[0].shape[-1] != self.router.width:
            return result
        self.map_count += 1
        for edit in self.edits:
            new = edit(result)
            result = result if new is None else new
        return result


# ---- which experts -------------------------------------------------------------------------------------------------


@torch.no_grad()
def chosen_experts(layout: Layout, layer: int, logits: Tensor) -> Tensor:
    """The experts that a block's router chooses for logits `[tokens, experts]`: booleans of that shape, on the CPU.

    The router's own forward runs, with its logits replaced by these.

    Raises:
        UnsupportedError: The router doesn't return its choice, or needs more inputs than activations.
    """
    router = router_of(layout, layer)
    parameter = next(p for p in router.source.parameters())
    device = device_of(router.source)
    moved = logits.to(device)
    x = torch.zeros(len(logits), router.width, dtype=parameter.dtype, device=device)

    def given_logits(made: Tensor) -> Tensor:
        return moved.to(made.dtype).view(made.shape)

    handle: Any = (
        router.source.register_forward_hook(lambda *call: given_logits(call[2])) if router.outputs_logits else None
    )
    handle = handle or LogitsHook(router, given_logits)
    try:
        output = _router_output(layout.blocks[layer], router, x)
    except TrimtabError:
        raise
    except Exception as error:
        raise UnsupportedError(f"{type(router.module).__name__} can't choose experts on its own: {error}") from error
    finally:
        handle.remove()
    listed = [
        tensor for tensor in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(tensor, Tensor)
    ]
    indices = [
        tensor
        for tensor in listed
        if not tensor.is_floating_point() and tensor.dim() == 2 and len(tensor) == len(logits)
    ]
    if len(indices) == 1:
        chosen = torch.zeros(logits.shape, dtype=torch.bool, device=device)
        return chosen.scatter_(1, indices[0].long(), True).cpu()
    scores = [tensor for tensor in listed if tensor.shape == logits.shape and bool((tensor == 0).any())]
    if len(scores) == 1:  # 0 for experts that aren't chosen
        return (scores[0] != 0).cpu()
    raise UnsupportedError(f"{type(router.module).__name__} doesn't return the experts that it chooses")
