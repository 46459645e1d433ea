"""Products of rows with the cached keys and values that they share with the other rows of their request, not copied.

If all requests of a batch have the same number of rows, in order, this is one batched product, else one per request.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Spans = Sequence[tuple[int, slice]]
"""A request, and adjacent rows of it."""


def queries_by_keys(queries: Tensor, keys: Tensor, spans: Spans) -> Tensor:
    """The products of each row's query with the keys of its request.

    Args:
        queries: `[heads, rows, size]`; adjacent heads share a group of keys.
        keys: `[requests, groups, columns, size]`.
        spans: The rows of each request.

    Returns:
        `[heads, rows, columns]`.
    """
    return _products(queries, keys.mT, spans)


def weights_by_values(weights: Tensor, values: Tensor, spans: Spans) -> Tensor:
    """Each row's weighted sum of the values of its request.

    Args:
        weights: `[heads, rows, columns]`.
        values: `[requests, groups, columns, size]`.
        spans: The rows of each request.

    Returns:
        `[heads, rows, size]`.
    """
    return _products(weights, values, spans)


def _products(left: Tensor, past: Tensor, spans: Spans) -> Tensor:
    heads, rows, size = left.shape
    requests, groups = past.shape[:2]
    each = rows // requests
    if all(span == (b, slice(b * each, (b + 1) * each)) for b, span in enumerate(spans)) and len(spans) == requests:
        split = left.view(groups, -1, requests, each, size).movedim(2, 0)
        products = split.reshape(requests, groups, -1, size) @ past
        return products.view(requests, groups, -1, each, past.shape[-1]).movedim(0, 2).reshape(heads, rows, -1)
    by_group = left.view(groups, -1, rows, size)
    parts = [
        (by_group[:, :, span].reshape(groups, -1, size) @ past[request]).view(heads, -1, past.shape[-1])
        for request, span in spans
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
