"""Pretend GPUs: tensors that say `cuda:0` or `cuda:1`, though their numbers are on the CPU, and what they would cost.

Within `pretending()` everything that Python calls on such tensors is looked at: tensors of different devices aren't
mixed but where CUDA allows it, and kernel launches, waits of the host for the device and copies from the host to the
device are counted, by the line of trimtab that they come from (the model's own: by the line that runs the model).
Results are those of the CPU, to the bit.

A launch is an operator of ATen that isn't a view and isn't allocation alone, as the CPU's dispatcher sees it. CUDA may
take more than one kernel for one (`topk`), so that launches are a lower bound; waits and copies are exact.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import trimtab

OURS = str(Path(trimtab.__file__).parent)
GPUS = [torch.device("cuda", number) for number in range(2)]
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}
MIXES = {Tensor.copy_, Tensor.view_as, Tensor.expand_as, Tensor.reshape_as, Tensor.type_as}
"""What may be given tensors of different devices."""
INDEXES = {Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_, Tensor.index_put}
"""What may be given indices that are on the CPU: they are copied."""
STRICT = {torch.cat, torch.stack, torch.gather, Tensor.gather, torch.index_select, Tensor.index_select}
"""What takes no number of the CPU, though it be one alone."""
FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
ONE_KERNEL = {torch.nn.functional.rms_norm}
"""What CUDA has one kernel for, and the CPU's dispatcher takes apart."""
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "resize_"}
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave", "bincount",
}  # fmt: skip


@dataclass
class Counts:
    """What has been counted, each by `file:line`."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        for counter in (self.launches, self.waits, self.copies):
            counter.clear()

    @property
    def totals(self) -> tuple[int, int, int]:
        """Launches, waits and copies."""
        return self.launches.total(), self.waits.total(), self.copies.total()


_counts: list[Counts] = []  # of the contexts that are open


class OnGpu(Tensor):
    """A tensor on a pretend GPU."""

    gpu: int

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPUS[self.gpu]

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        indices = [] if name not in ("index", "index_put", "index_put_") else [i for i in args[1] if i is not None]
        if any(i.dtype == torch.bool for i in indices):
            _count("waits")
        for index in indices:
            if not isinstance(index, OnGpu):
                _count("copies")
        if name in WAITS and not (name == "repeat_interleave" and (kwargs or {}).get("output_size") is not None):
            _count("waits")
        elif name not in FREE and not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            _count("launches")
        return func(*args, **(kwargs or {}))


_operators = _Operators()


@contextmanager
def pretending() -> Iterator[Counts]:
    """While open, devices named `cuda` are the pretend ones, and what they do is counted."""
    counts = Counts()
    _counts.append(counts)
    try:
        with _Functions():
            yield counts
    finally:
        _counts.remove(counts)


def on_gpu(x: Tensor, gpu: int = 0) -> Tensor:
    """The same numbers on a pretend GPU; nothing is counted. They stay shared."""
    with torch._C.DisableTorchFunctionSubclass():
        made = x.detach().as_subclass(OnGpu)
    made.gpu = gpu
    return made


def off_gpu(x: Tensor) -> Tensor:
    """The numbers as they are, on the CPU; nothing is counted."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def move(module: nn.Module, gpu: int = 0) -> None:
    """Put a module, and all within it, on a pretend GPU, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(on_gpu(off_gpu(parameter), gpu), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = on_gpu(off_gpu(buffer), gpu)


def spread(model: nn.Module, parts: list[tuple[nn.Module, int]]) -> None:
    """Put each part of a model on its own pretend GPU, to which what it is given is moved, as under a `device_map`.

    What isn't in a part is on `cuda:0`, and so is what the model gives out.
    """
    move(model)
    for part, gpu in parts:
        move(part, gpu)
        part.forward = _aligned(part.forward, gpu)  # type: ignore[method-assign]
    model.forward = _aligned(model.forward, 0, outputs=True)  # type: ignore[method-assign]


def _aligned(forward: Callable[..., Any], gpu: int, *, outputs: bool = False) -> Callable[..., Any]:
    """The forward pass, given what it is given on this GPU; with `outputs`, what comes of it is put there as well."""

    def there(x: Any) -> Any:
        return x.to(GPUS[gpu]) if isinstance(x, OnGpu) else x

    @wraps(forward)
    def aligned(*args: Any, **kwargs: Any) -> Any:
        output = forward(*tree_map(there, args), **tree_map(there, kwargs))
        if outputs:
            for name in list(output):
                output[name] = there(output[name])
        return output

    return aligned


# ---- what a call on the device does --------------------------------------------------------------------------------


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func in MOVES:
        return _move(func, args, kwargs)
    tensors = [*_tensors(args), *_tensors(kwargs)]
    here = [x for x in tensors if isinstance(x, OnGpu)]
    device = _gpu_of(kwargs.get("device")) if kwargs else None
    if device is None and not here:
        return func(*args, **kwargs)
    if func is Tensor.numpy or func is Tensor.__array__:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first")
    if func is Tensor.__deepcopy__:
        return on_gpu(off_gpu(args[0]).clone(), args[0].gpu)
    if func is Tensor.tolist:
        _count("waits")
        return off_gpu(args[0]).tolist()
    if func in FROM_DATA and not here:
        _count("copies")
    elif func is Tensor.copy_ and here:
        if len(here) < len(tensors):
            _count("copies" if isinstance(args[0], OnGpu) else "waits")
            return func(*args, **kwargs)
    else:
        _check_same(func, args, tensors)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif func is Tensor.new_tensor:
        _count("copies")
    gpu = here[0].gpu if device is None else device
    with nullcontext() if func in ONE_KERNEL else _operators:
        result = func(*args, **kwargs)
    if func in ONE_KERNEL:
        _count("launches")
    if device is None and str(kwargs.get("device")) == "cpu":
        return result
    if type(result) is Tensor:
        return result if any(result is x for x in tensors) else on_gpu(result, gpu)
    if isinstance(result, (tuple, list)):
        return tree_map(lambda x: on_gpu(x, gpu) if type(x) is Tensor else x, result)
    return result


def _tensors(arguments: Any) -> Iterator[Tensor]:
    """The tensors among arguments."""
    for x in arguments.values() if isinstance(arguments, dict) else arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (tuple, list, dict)):
            yield from _tensors(x)


def _check_same(func: Any, args: Any, tensors: list[Tensor]) -> None:
    if func in MIXES:
        return
    if func in INDEXES:
        base = args[0]
        where = list(_tensors(args[1:2]))
        if any(x.device not in (base.device, torch.device("cpu")) for x in where):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor"
                f" ({base.device}), found {', '.join(str(x.device) for x in where)}"
            )
        value = args[2] if len(args) > 2 and isinstance(args[2], Tensor) else None
        if value is not None and value.device != base.device and value.dim():
            if where:
                raise RuntimeError(f"expected self and value to be on the same device, {base.device}, {value.device}")
            _count("copies" if isinstance(base, OnGpu) else "waits")
        return
    places = {getattr(x, "gpu", None) for x in tensors if isinstance(x, OnGpu) or x.dim() or func in STRICT}
    if len(places) > 1:
        devices = {"cpu" if place is None else f"cuda:{place}" for place in places}
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices,"
            f" {' and '.join(sorted(devices))}! (in {getattr(func, '__name__', func)})"
        )


def _move(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    x, rest = args[0], args[1:]
    if func is Tensor.cpu:
        rest, kwargs = (torch.device("cpu"),), {}
    elif func is Tensor.cuda:
        rest, kwargs = (torch.device("cuda", rest[0] if rest and isinstance(rest[0], int) else 0),), {}
    elif other := [like for like in (*rest, kwargs.get("other")) if isinstance(like, Tensor)]:
        rest = (other[0].device, other[0].dtype, *(more for more in rest if not isinstance(more, Tensor)))
        kwargs = {name: value for name, value in kwargs.items() if name != "other"}
    copy = bool(kwargs.pop("copy", False)) if (kwargs := dict(kwargs)) else False
    device, dtype, _, _ = torch._C._nn._parse_to(*rest, **kwargs)
    start, end = getattr(x, "gpu", None), getattr(x, "gpu", None)
    if device is not None:
        end = _gpu_of(device)
    if start is None and end is None:
        return func(*args, **(kwargs | ({"copy": True} if copy else {})))
    if start == end:
        with _operators:
            result = x.to(dtype or x.dtype, copy=copy)
        return x if result is x else on_gpu(result, start or 0)
    _count("copies" if start is None else "waits" if end is None else "launches")
    if dtype not in (None, x.dtype) and start is not None:
        _count("launches")
    moved = off_gpu(x).to(dtype or x.dtype, copy=True)
    return moved if end is None else on_gpu(moved, end)


def _gpu_of(device: Any) -> int | None:
    """The number of a device that is a GPU; `None` for others."""
    device = torch.device(device) if isinstance(device, str) else device
    return (device.index or 0) if isinstance(device, torch.device) and device.type == "cuda" else None


def _count(what: str) -> None:
    if not _counts:
        return
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    line = f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}" if frame is not None else "outside"
    for counts in _counts:
        getattr(counts, what)[line] += 1
