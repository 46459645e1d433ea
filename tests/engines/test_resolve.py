"""From steerings to what acts: gates, operations that prompts decide, and conditions on tokens, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab import Add, Edit, Positions, ScaleElements, Site, Steering, Threshold, TrimtabError
from trimtab.engines.resolve import Resolved, check_prompt, resolve
from trimtab.steering import HoldElements
from trimtab.steering.conditional import Conditional

WIDTH, LENGTHS = 4, [3, 5, 2]
PROMPTS = [torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in LENGTHS]
V = torch.tensor([1.0, -2.0, 0.5, 3.0])
ADD = Edit(Site(3), Add(V))


def activations(request: int, site: Site) -> Tensor:
    return PROMPTS[request] * (site.layer + 1)


class Reader:
    """Gives what is asked for, and remembers it."""

    def __init__(self) -> None:
        self.reads: list[tuple[dict[int, list[int]], list[Site]]] = []

    def __call__(self, where: Any, sites: Sequence[Site], tokens: int) -> Any:
        assert tokens > 0
        self.reads.append(({i: list(positions) for i, positions in where.items()}, list(sites)))
        return {i: {site: activations(i, site)[list(positions)] for site in sites} for i, positions in where.items()}


def resolved(*steerings: Steering | None) -> tuple[Resolved, Reader]:
    read = Reader()
    return resolve(steerings, LENGTHS[: len(steerings)], read), read


def test_nothing_is_read_where_nothing_is_to_be_decided() -> None:
    resolutions, read = resolved(Steering((ADD,)), None, Steering((ADD, Edit(Site(1), Add(V), strength=0.0))))
    assert read.reads == []
    assert resolutions.edits == [(ADD,), (), (ADD,)]
    assert resolutions.names == [(str(ADD),), (), (str(ADD),)]


@pytest.mark.parametrize("pool", ["mean", "unit-mean"])
def test_gates_are_the_formula_over_the_tokens_that_they_read(pool: str) -> None:
    where = Positions.all_but_first()
    for request in range(3):
        x = activations(request, Site(2))[1:]
        x = x / x.norm(dim=-1, keepdim=True) if pool == "unit-mean" else x
        value = float(x.mean(0) @ V.double())
        for threshold in (value - 1e-6, value + 1e-6):
            gate = Threshold(Site(2), V, threshold, positions=where, pool=pool)
            resolutions, read = resolved(*[Steering((ADD,)).when(gate) if i == request else None for i in range(3)])
            assert bool(resolutions.edits[request]) == (threshold < value)
            assert read.reads == [({request: list(range(1, LENGTHS[request]))}, [Site(2)])]


def test_only_what_is_read_is_asked_for() -> None:
    last = Threshold(Site(0), V, -1e9)
    first = Threshold(Site(2), V, -1e9, positions=Positions.span(0, 1))
    resolutions, read = resolved(Steering((ADD,)).when(last & first), None, Steering((ADD,)).when(~last))
    assert read.reads == [({0: [0, 2], 2: [1]}, [Site(0), Site(2)])]
    assert [len(edits) for edits in resolutions.edits] == [1, 0, 0]


def test_prompts_decide_operations_behind_open_gates_only() -> None:
    held = Edit(Site(1), HoldElements(torch.ones(WIDTH)))
    shut = Threshold(Site(0), V, 1e9)
    resolutions, read = resolved(Steering((held,)), Steering((held,)).when(shut))
    assert read.reads == [({1: [4]}, [Site(0)]), ({0: [0, 1, 2]}, [Site(1)])]
    (edit,) = resolutions.edits[0]
    assert edit.operation == held.operation.settled(activations(0, Site(1)))
    assert resolutions.edits[1] == ()
    assert resolutions.names == [(str(held),), ()]


def test_conditions_on_tokens_are_put_into_operations() -> None:
    each = Threshold(Site(3), V, 0.5, each_token=True)
    open_too = Threshold(Site(0), V, -1e9)
    resolutions, _ = resolved(Steering((ADD,)).when(each & open_too), Steering((ADD,)).when(each | open_too))
    (conditional,), (plain,) = resolutions.edits
    assert isinstance(conditional.operation, Conditional)
    assert conditional.operation.gate == each
    assert plain.operation == ADD.operation


def test_a_prompt_that_is_too_short_is_refused() -> None:
    check_prompt(Steering((ADD,)), 1)
    for steering in (
        Steering((Edit(Site(1), ScaleElements(torch.ones(WIDTH)), Positions.span(2, 4)),)),
        Steering((ADD,)).when(Threshold(Site(0), V, 0.0, positions=Positions.span(2, 4))),
        Steering((ADD,)).when(Threshold(Site(0), V, 0.0, positions=Positions.generated())),
    ):
        with pytest.raises(TrimtabError):
            check_prompt(steering, 3)
