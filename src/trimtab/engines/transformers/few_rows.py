"""Linear maps of a few rows on a CPU, up to twice as fast as torch's.

Decoding a small batch is bound by reading the weights. Intel's MKL, which torch calls, takes rows three at a time and
reads the whole weight anew for each three: 8 rows take nearly three times as long as one. Here the weight is taken in
pieces that stay in the processor's cache while all rows pass through them, by one batched product over views of it.
Nothing is copied or packed but the result, which is torch's but for rounding; with one thread it was equal to the bit.

From 16 rows on MKL has another way, which is left to it. On other processors and libraries a trial decides; an AMD EPYC
without AVX-512 gains nothing on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

FEWEST, MOST = 4, 15
LEAST_WEIGHT = 1 << 16
"""Numbers in a weight from which it pays: a smaller one stays in the cache by itself."""
PIECE = 48 * 1024
"""Numbers in a piece, at most: 192 KiB in float32, beside the rows, in a second-level cache of 256 KiB or more."""
NARROWEST, WIDEST = 8, 64
"""Outputs of a piece."""
PAYS = 1.15
"""How many times as fast the trial has to be."""


@contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """While open, the model's linear maps in float32 on a CPU take 4 to 15 rows in pieces, if that pays here.

    Modules that are no plain `nn.Linear`, or whose `forward` somebody has replaced, are left alone. The model is as it
    was when the context is left.
    """
    modules = [] if hasattr(model, "_orig_mod") else [module for module in model.modules() if _suits(module)]
    if modules and not pays():
        modules = []
    ours = [(module, partial(_forward, module)) for module in modules]
    try:
        for module, forward in ours:
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in ours:
            if vars(module).get("forward") is forward:  # nobody has put another in its place meanwhile
                del module.forward


def in_pieces(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear(x, weight, bias)`, `[rows, out]`, for rows `[rows, in]` and a contiguous weight `[out, in]`."""
    out, width = weight.shape
    piece = _piece(width)
    count = out // piece
    if count == 0:
        return linear(x, weight, bias)
    whole = count * piece
    pieces = weight[:whole].view(count, piece, width)
    found = torch.bmm(x.expand(count, *x.shape), pieces.transpose(1, 2)).transpose(0, 1).reshape(len(x), whole)
    if whole < out:
        found = torch.cat([found, linear(x, weight[whole:])], 1)
    return found if bias is None else found + bias


def _piece(width: int) -> int:
    """The outputs of a piece: a power of two."""
    return max(NARROWEST, min(WIDEST, 1 << (max(1, PIECE // width).bit_length() - 1)))


def _suits(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    return (
        type(weight) is nn.Parameter  # quantized and distributed weights are tensors of their own kind
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and weight.numel() >= LEAST_WEIGHT
    )


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    weight = module.weight
    rows = x.numel() // weight.shape[1]
    if not FEWEST <= rows <= MOST:
        return linear(x, weight, module.bias)
    found = in_pieces(x.reshape(rows, -1), weight, module.bias)
    return found.view(*x.shape[:-1], -1)


@cache
def pays() -> bool:
    """Whether pieces are faster here: tried once a process, in a tenth of a second, on a few weights of 9 MiB."""
    if not torch.backends.mkl.is_available():
        return False
    with torch.no_grad():
        weights = [torch.ones(1536, 1536) for _ in range(6)]  # more together than the caches hold
        rows = torch.ones(8, 1536)
        ways: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (linear, in_pieces)
        best = [float("inf")] * 2
        for _ in range(3):
            for i, way in enumerate(ways):
                began = time.perf_counter()
                for weight in weights:
                    way(rows, weight)
                best[i] = min(best[i], time.perf_counter() - began)
    return best[0] >= PAYS * best[1]
