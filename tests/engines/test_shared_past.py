"""Products with the past, batched or not, are those of each row alone."""

from __future__ import annotations

import pytest
import torch

from trimtab.engines.transformers.shared_past import queries_by_keys, weights_by_values

EVEN = [(0, slice(0, 2)), (1, slice(2, 4)), (2, slice(4, 6))]
SPANS = {
    "equally many": EVEN,
    "one each": [(b, slice(b, b + 1)) for b in range(3)],
    "unlike": [(0, slice(0, 1)), (1, slice(1, 4)), (2, slice(4, 6))],
    "another order": [(2, slice(0, 2)), (1, slice(2, 4)), (0, slice(4, 6))],
    "not all": [(0, slice(0, 2)), (2, slice(2, 4))],
    "one request": [(1, slice(0, 4))],
    "once, and again as a guess": [*EVEN, (0, slice(6, 7)), (1, slice(7, 8)), (2, slice(8, 9))],
}


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_they_are_those_of_each_row_alone(name: str, groups: int) -> None:
    spans, heads, size = SPANS[name], 4, 3
    rows = spans[-1][1].stop
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    queries, keys, values = random(heads, rows, size), random(3, groups, 8, size), random(3, groups, 8, 5)
    keys, values = keys[:, :, :-1], values[:, :, 1:]  # as windows on buffers are
    products = queries_by_keys(queries, keys, spans)
    sums = weights_by_values(products, values, spans)
    assert products.shape == (heads, rows, 7)
    for request, span in spans:
        for row in range(span.start, span.stop):
            for head in range(heads):
                group = head * groups // heads
                wanted = keys[request, group] @ queries[head, row]
                assert torch.allclose(products[head, row], wanted)
                assert torch.allclose(sums[head, row], wanted @ values[request, group])
