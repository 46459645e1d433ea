"""Linear layers for a few rows on a CPU, up to twice as fast as torch's.

Decoding a small batch is bound by reading the weights. Intel's MKL, which torch calls, processes three rows at a time
and reads the whole weight again for each three: 8 rows take nearly three times as long as one. Here the weight is split
into pieces that stay in the processor's cache while all rows are multiplied with them, in one batched product over
views of the weight. Only the result is copied. It equals torch's up to rounding; with one thread it was equal bit for
bit.

From 16 rows on, MKL uses another algorithm, and torch's own call is kept, as it is for a single row. The minimum number
of rows for which pieces pay off was measured on an Intel Xeon with AVX-512 and on an AMD EPYC without it, where they
gain nothing on one thread and much on two. The choice depends only on the hardware and the number of threads, not on a
benchmark at run time, so that all runs on a machine round alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

MOST = 15
LEAST_WEIGHT = 1 << 16
"""The minimum number of elements of a weight for which pieces pay off; a smaller one stays in the cache anyway."""
PIECE = 48 * 1024
"""The maximum number of elements of a piece: 192 KiB in float32, to fit with the rows in an L2 cache of 256 KiB."""
NARROWEST, WIDEST = 8, 64
"""The minimum and maximum number of output features of a piece."""


@contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """While open, the model's float32 linear layers on a CPU process few rows (`fewest()` to 15) in pieces.

    Modules that aren't a plain `nn.Linear`, or whose `forward` has been replaced, are left alone. On exit the model is
    restored.
    """
    least = fewest()
    left_alone = least > MOST or hasattr(model, "_orig_mod")
    modules = [] if left_alone else [module for module in model.modules() if _suits(module)]
    ours = [(module, partial(_forward, module, least)) for module in modules]
    try:
        for module, forward in ours:
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in ours:
            if vars(module).get("forward") is forward:  # unless it has been replaced in the meantime
                del module.forward


def in_pieces(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `linear(x, weight, bias)` `[rows, out]` for rows `[rows, in]` and a contiguous weight `[out, in]`."""
    out, width = weight.shape
    piece = _piece(width)
    count = out // piece
    if count == 0:
        return linear(x, weight, bias)
    whole = count * piece
    pieces = weight[:whole].view(count, piece, width)
    product = torch.bmm(x.expand(count, *x.shape), pieces.transpose(1, 2)).transpose(0, 1).reshape(len(x), whole)
    if whole < out:
        product = torch.cat([product, linear(x, weight[whole:])], 1)
    return product if bias is None else product + bias


def _piece(width: int) -> int:
    """The number of output features of a piece, a power of two."""
    return max(NARROWEST, min(WIDEST, 1 << (max(1, PIECE // width).bit_length() - 1)))


def _suits(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    return (
        type(weight) is nn.Parameter  # quantized and distributed weights have other types
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and weight.numel() >= LEAST_WEIGHT
    )


def _forward(module: nn.Linear, least: int, x: Tensor) -> Tensor:
    weight = module.weight
    rows = x.numel() // weight.shape[1]
    if not least <= rows <= MOST:
        return linear(x, weight, module.bias)
    product = in_pieces(x.reshape(rows, -1), weight, module.bias)
    return product.view(*x.shape[:-1], -1)


def fewest() -> int:
    """The minimum number of rows for which pieces are faster on this machine; more than `MOST` if they never are."""
    if not torch.backends.mkl.is_available():
        return MOST + 1
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return 4
    return 2 if torch.get_num_threads() > 1 else MOST + 1
