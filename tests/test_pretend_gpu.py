"""The pretend GPU does what a GPU would: it refuses what CUDA refuses, and counts what CUDA would have to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretend_gpu import Counts, OnGpu, move, off_gpu, on_gpu, pretending
from tiny import prompt, tiny
from torch import Tensor

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def counted(work: Callable[[Tensor], Any]) -> tuple[int, int, int]:
    """The launches, waits and copies of some work on a tensor `[3, 8]` of the device."""
    x = on_gpu(X.clone())
    with pretending() as counts:
        work(x)
    return counts.totals


def test_it_says_where_it_is_and_computes_what_the_cpu_does() -> None:
    x = on_gpu(X)
    assert x.device == torch.device("cuda:0")
    assert on_gpu(X, 1).device == torch.device("cuda:1")
    assert x.is_cuda
    product = x @ x.T
    assert product.device == x.device
    assert type(product) is OnGpu
    assert torch.equal(off_gpu(product), X @ X.T)
    assert type(product.cpu()) is Tensor
    with pretending():
        assert torch.zeros(2, device="cuda:1").device == torch.device("cuda:1")
        assert X.to("cuda").device == torch.device("cuda:0")
        assert x[:, 0].new_zeros(2).device == x.device
        assert x.to(X).device == X.device


def test_what_is_done_in_place_is_done_to_the_tensor_itself() -> None:
    x = on_gpu(X.clone())
    same = x
    x += 1
    x[:, 0] = 0
    assert x is same
    wanted = X + 1
    wanted[:, 0] = 0
    assert torch.equal(off_gpu(x), wanted)
    lengths = on_gpu(torch.zeros(3))
    assert torch.linalg.vector_norm(x, dim=-1, out=lengths) is lengths
    assert torch.equal(off_gpu(lengths), wanted.norm(dim=-1))


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: x.add_(y),
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: torch.addcmul(x, x, y),
        lambda x, y: x @ y.T,
        lambda x, y: torch.nn.functional.linear(x, y),
        lambda x, y: torch.stack([x[0, 0], y[0, 0]]),
    ],
)
@pytest.mark.parametrize("other", [X, on_gpu(X, 1)], ids=["cpu", "cuda:1"])
def test_devices_are_not_mixed(mix: Callable[[Tensor, Tensor], Tensor], other: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"same device.*cuda:0"):
        mix(on_gpu(X), other)


def test_what_cuda_takes_from_another_device() -> None:
    """A number alone, an index on the CPU, and what is copied."""
    x, rows = on_gpu(X.clone()), torch.tensor([2, 0])
    assert torch.equal(off_gpu(x * torch.tensor(2.0)), X * 2)
    assert torch.equal(off_gpu(x[rows]), X[rows])
    assert torch.equal(off_gpu(x.copy_(X + 1)), X + 1)
    assert torch.equal(torch.zeros(3, 8).copy_(x), X + 1)
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        x[on_gpu(rows, 1)]
    with pytest.raises(RuntimeError, match="same device"):
        x[rows] = torch.zeros(2, 8)
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\)"):
        x.numpy()


@pytest.mark.parametrize(
    ("work", "launches", "waits", "copies"),
    [
        (lambda x: x + 1, 1, 0, 0),
        (lambda x: x.add_(x), 1, 0, 0),
        (lambda x: x[:, 1:].T, 0, 0, 0),
        (lambda x: x.to("cuda:0"), 0, 0, 0),
        (lambda x: x.double(), 1, 0, 0),
        (lambda x: torch.empty(2, device=x.device), 0, 0, 0),
        (lambda x: torch.zeros(2, device=x.device), 1, 0, 0),
        (lambda x: torch.addcmul(x, x, x), 1, 0, 0),
        (lambda x: (x * x).sum(-1, keepdim=True), 2, 0, 0),
        (lambda x: x.to("cuda:1"), 1, 0, 0),
        (lambda x: x[0, 0].item(), 0, 1, 0),
        (lambda x: bool(x[0, 0]), 0, 1, 0),
        (lambda x: float(x[0, 0]), 0, 1, 0),
        (lambda x: x.tolist(), 0, 1, 0),
        (lambda x: x.cpu(), 0, 1, 0),
        (lambda x: x.nonzero(), 0, 1, 0),
        (lambda x: bool((x > 0).all()), 2, 1, 0),
        (lambda x: x[x > 0], 2, 1, 0),
        (lambda x: torch.equal(x, x + 1), 1, 1, 0),
        (lambda x: torch.tensor([1, 2], device=x.device), 0, 0, 1),
        (lambda x: X.to(x.device), 0, 0, 1),
        (lambda x: x[torch.tensor([0, 1])], 1, 0, 1),
        (lambda x: x[[0, 1]], 1, 0, 1),
        (lambda x: x.copy_(X), 0, 0, 1),
    ],
)
def test_what_is_counted(work: Callable[[Tensor], Any], launches: int, waits: int, copies: int) -> None:
    assert counted(work) == (launches, waits, copies)


def test_it_is_counted_by_the_line_of_ours_that_it_comes_from() -> None:
    from trimtab.steering.operations import with_norm_of

    x = on_gpu(X)
    with pretending() as counts:
        with_norm_of(x, x + 1)
        x.tolist()
    assert {line.split(":")[0] for line in counts.launches} == {"operations.py", "outside"}
    assert counts.launches["outside"] == 1
    assert counts.waits == {"outside": 1}
    counts.clear()
    assert counts == Counts()


def test_a_model_on_it_answers_as_it_does_on_the_cpu() -> None:
    lm, prompts = tiny("llama"), [prompt(0, 6), prompt(1, 4)]
    wanted = lm.generate(prompts, max_new_tokens=6)
    move(lm.model)
    with pretending() as counts:
        answers = lm.generate(prompts, max_new_tokens=6)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in wanted]
    assert all(counts.totals)
