"""Logistic probes: against scikit-learn, and what must hold of a minimum."""

from __future__ import annotations

import pytest
import torch

from trimtab import TrimtabError
from trimtab.learn.probes import logistic


def data(seed: int, n: int = 60, width: int = 7, heads: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, n, width, generator=generator, dtype=torch.float64)
    y = (x[0, :, 0] + 0.7 * torch.randn(n, generator=generator, dtype=torch.float64) > 0.2).double()
    return x, y


@pytest.mark.parametrize("penalty", [0.01, 1.0, 30.0])
def test_the_gradient_is_zero(penalty: float) -> None:
    x, y = data(1)
    weight, bias = logistic(x, y, penalty)
    for h in range(3):
        w, b = weight[h].clone().requires_grad_(), bias[h].clone().requires_grad_()
        losses = [torch.log1p(torch.exp(-(2 * label - 1) * (row @ w + b))) for row, label in zip(x[h], y, strict=True)]
        (torch.stack(losses).sum() + penalty / 2 * (w * w).sum()).backward()
        assert float(w.grad.abs().max()) < 1e-6  # type: ignore[union-attr]
        assert float(b.grad.abs()) < 1e-6  # type: ignore[union-attr]


def test_scikit_learn_finds_the_same() -> None:
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn isn't installed")
    x, y = data(2)
    weight, bias = logistic(x, y)
    for h in range(3):
        fitted = linear.LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(x[h].numpy(), y.numpy())
        assert torch.allclose(weight[h], torch.tensor(fitted.coef_[0]), atol=1e-5)
        assert float(bias[h]) == pytest.approx(float(fitted.intercept_[0]), abs=1e-5)


def test_separable_and_huge_values() -> None:
    """With a penalty there is a minimum where the sides don't overlap; no step runs away."""
    x = torch.cat([torch.full((20, 2), 300.0), torch.full((20, 2), -300.0)]).double()
    x += torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([1.0] * 20 + [0.0] * 20)
    weight, bias = logistic(x, y)
    assert torch.isfinite(weight).all()
    assert bool((((x @ weight + bias) > 0) == y.bool()).all())


def test_more_dimensions_than_examples() -> None:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.tensor([1.0, 0, 1, 0, 1, 0])
    weight, bias = logistic(x, y)
    assert bool((((x @ weight + bias) > 0) == y.bool()).all())


def test_what_it_refuses() -> None:
    x, y = data(1)
    with pytest.raises(TrimtabError, match="both kinds"):
        logistic(x, torch.ones_like(y))
    with pytest.raises(TrimtabError, match="labelled 0 and 1"):
        logistic(x, 2 * y)
    with pytest.raises(TrimtabError, match="above 0"):
        logistic(x, y, 0.0)
