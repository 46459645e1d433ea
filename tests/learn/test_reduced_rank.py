"""Reduced-rank ridge regression: against NumPy, on maps that were planted, and at its ends."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab import TrimtabError
from trimtab.learn.reduced_rank import RIDGE, ReducedRankMap, reduced_rank

TOKENS, WIDTH = 60, 12


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def applied(fitted: ReducedRankMap, x: Tensor) -> Tensor:
    return (x.double() @ fitted.read.double().T) @ fitted.write.double() + fitted.vector.double()


def naive(x: Tensor, delta: Tensor, rank: int, ridge: float) -> np.ndarray:
    """The fitted shifts `[tokens, width]`, by the textbook."""
    a, b = x.double().numpy(), delta.double().numpy()
    a_centred, b_centred = a - a.mean(0), b - b.mean(0)
    gram = a_centred.T @ a_centred
    penalty = ridge * np.trace(gram) / gram.shape[0]
    weights = np.linalg.inv(gram + penalty * np.eye(len(gram))) @ a_centred.T @ b_centred
    _, _, right = np.linalg.svd(a_centred @ weights, full_matrices=False)
    leading = right[:rank]
    return a_centred @ weights @ leading.T @ leading + b.mean(0)


@pytest.mark.parametrize("rank", [0, 1, 3, WIDTH, 50])
@pytest.mark.parametrize("ridge", [1e-6, RIDGE, 5.0])
def test_it_is_the_textbooks(rank: int, ridge: float) -> None:
    x, delta = 3 + random(0, TOKENS, WIDTH), random(1, TOKENS, WIDTH) + 0.5
    fitted = reduced_rank(x, delta, rank, ridge)
    assert torch.allclose(applied(fitted, x), torch.from_numpy(naive(x, delta, rank, ridge)), atol=1e-5)
    assert fitted.read.shape == fitted.write.shape == (min(rank, WIDTH), WIDTH)
    assert {fitted.read.dtype, fitted.write.dtype, fitted.vector.dtype} == {torch.float32}


def test_a_planted_map_is_found() -> None:
    x = 2 + random(0, TOKENS, WIDTH)
    planted = random(1, WIDTH, 3) @ random(2, 3, WIDTH)
    offset = random(3, WIDTH)
    delta = x @ planted + offset
    fitted = reduced_rank(x, delta, 3, ridge=1e-10)
    assert torch.allclose(fitted.read.double().T @ fitted.write.double(), planted, atol=1e-5)
    assert torch.allclose(fitted.vector.double(), offset, atol=1e-4)
    assert fitted.explained == pytest.approx(1.0, abs=1e-9)
    assert reduced_rank(x, delta, 2, ridge=1e-10).explained < 1 - 1e-3


def test_rank_0_is_the_mean() -> None:
    x, delta = random(0, TOKENS, WIDTH), random(1, TOKENS, WIDTH) + 1
    fitted = reduced_rank(x, delta, 0)
    assert torch.equal(fitted.vector, delta.mean(0).float())
    assert fitted.read.shape == (0, WIDTH)
    assert fitted.explained == pytest.approx(float(len(x) * delta.mean(0).square().sum() / delta.square().sum()))


def test_what_is_written_is_orthonormal() -> None:
    fitted = reduced_rank(random(0, TOKENS, WIDTH), random(1, TOKENS, WIDTH), 4)
    assert torch.allclose(fitted.write @ fitted.write.T, torch.eye(4), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 5, TOKENS])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_explained_is_a_share_that_grows_with_the_rank(seed: int, tokens: int) -> None:
    x, delta = random(seed, tokens, WIDTH), random(seed + 10, tokens, WIDTH)
    delta -= (1 - seed / 4) * delta.mean(0)  # for some, the mean alone explains nothing
    shares = [reduced_rank(x, delta, rank).explained for rank in range(WIDTH + 1)]
    assert all(0 <= share <= 1 for share in shares)
    assert all(b >= a - 1e-9 for a, b in pairwise(shares))


def test_activations_that_are_all_the_same_tell_the_mean_alone() -> None:
    x, delta = torch.ones(4, WIDTH), random(1, 4, WIDTH)
    fitted = reduced_rank(x, delta, 3)
    assert torch.allclose(applied(fitted, x), delta.mean(0).expand(4, WIDTH), atol=1e-6)
    of_a_single_token = reduced_rank(x[:1], delta[:1], 3)
    assert torch.allclose(applied(of_a_single_token, x[:1]), delta[:1], atol=1e-6)


def test_no_shift_at_all() -> None:
    fitted = reduced_rank(random(0, TOKENS, WIDTH), torch.zeros(TOKENS, WIDTH), 2)
    assert fitted.explained == 1.0
    assert not applied(fitted, random(1, 3, WIDTH)).any()


def test_small_types_and_the_same_bytes() -> None:
    x, delta = (random(seed, TOKENS, WIDTH).bfloat16() for seed in (0, 1))
    a, b, wide = reduced_rank(x, delta, 3), reduced_rank(x, delta, 3), reduced_rank(x.double(), delta.double(), 3)
    for name in ("read", "write", "vector"):
        assert torch.equal(getattr(a, name), getattr(b, name))
        assert torch.equal(getattr(a, name), getattr(wide, name))


@pytest.mark.parametrize(
    ("x", "delta", "message"),
    [
        (torch.ones(3, 4), torch.ones(3, 5), r"got \[3, 4\], \[3, 5\]"),
        (torch.ones(4), torch.ones(4), r"\[tokens, width\], got \[4\]"),
        (torch.ones(0, 4), torch.ones(0, 4), r"got \[0, 4\]"),
        (torch.full((3, 4), float("nan")), torch.ones(3, 4), "not finite"),
        (torch.ones(3, 4), torch.full((3, 4), float("inf")), "not finite"),
    ],
)
def test_errors(x: Tensor, delta: Tensor, message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        reduced_rank(x, delta, 1)
