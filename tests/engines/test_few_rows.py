"""Linear maps of few rows: torch's own, in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.nn.functional import linear

from trimtab import Add, Edit, Site, Steering
from trimtab.decoding.rejection import Rejection
from trimtab.engines.transformers import few_rows as module
from trimtab.engines.transformers.few_rows import MOST, few_rows, fewest, in_pieces

CAN_REJECT = ("llama", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi3")
SHAPES = [(576, 576), (192, 576), (1000, 130), (64, 1536), (13, 40_000), (7, 3), (50_257, 16)]
FEWEST = 3


@pytest.fixture(autouse=True)
def _it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fewest", lambda: FEWEST)


def model(*, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 700, bias=bias), nn.GELU(), nn.Linear(700, 205), nn.Linear(205, 8)).to(dtype)


def replaced(some: nn.Module) -> list[str]:
    return [name for name, part in some.named_modules() if "forward" in vars(part)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 15])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_map(shape: tuple[int, int], rows: int, bias: bool) -> None:
    """Against float64, within what sums of so many products in float32 are off by, in whatever order they are taken."""
    torch.manual_seed(1)
    x, weight = torch.randn(rows, shape[1]), torch.randn(shape)
    added = torch.randn(shape[0]) if bias else None
    product = in_pieces(x, weight, added)
    assert product.shape == (rows, shape[0])
    assert product.is_contiguous()
    exact = linear(x.double(), weight.double(), None if added is None else added.double())
    off = torch.finfo(torch.float32).eps * x.norm(dim=1).max() * weight.norm(dim=1).max()
    assert (product - exact).abs().max() <= 4 * off


def test_one_piece_fits_and_no_output_is_lost() -> None:
    for width in (1, 100, 576, 4_096, 14_336, 100_000):
        piece = module._piece(width)
        assert module.NARROWEST <= piece <= module.WIDEST
        assert piece * width <= module.PIECE or piece == module.NARROWEST


@pytest.mark.parametrize("rows", [1, FEWEST - 1, FEWEST, 9, MOST, MOST + 1])
def test_only_few_rows_go_in_pieces(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        seen.append((len(x), tuple(weight.shape)))
        return in_pieces(x, weight, bias)

    monkeypatch.setattr(module, "in_pieces", spy)
    some, x = model(), torch.randn(1, rows, 300)
    before = some(x)
    with few_rows(some):
        inside = some(x)
    # the last map is too small to be worth it
    assert seen == ([(rows, (700, 300)), (rows, (205, 700))] if FEWEST <= rows <= MOST else [])
    assert inside.shape == before.shape
    torch.testing.assert_close(inside, before, rtol=1e-5, atol=1e-6)


def test_the_model_is_as_it_was() -> None:
    some = model()
    with few_rows(some):
        assert replaced(some) == ["0", "2"]
        with few_rows(some):
            pass
        assert replaced(some) == ["0", "2"]  # an inner context takes nothing from the outer one
    assert replaced(some) == []
    with pytest.raises(RuntimeError, match="meant"), few_rows(some):
        raise RuntimeError("meant")
    assert replaced(some) == []


def test_what_others_put_in_its_place_stays() -> None:
    some = model()

    def theirs(x: torch.Tensor) -> torch.Tensor:
        return x

    with few_rows(some):
        some[0].forward = theirs
    assert replaced(some) == ["0"]
    assert some[0].forward is theirs


def test_what_is_left_alone() -> None:
    class Own(nn.Linear):
        pass

    class Quantized(torch.Tensor):
        pass

    others = nn.Sequential(Own(500, 500), nn.Linear(500, 500), nn.Linear(500, 500))

    def theirs(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    others[1].forward = theirs
    others[2].weight = nn.Parameter(torch.randn(500, 500).T)  # not contiguous
    others.append(nn.Linear(500, 500))
    others[3].weight = nn.Parameter(torch.randn(500, 500).as_subclass(Quantized))
    assert type(others[3].weight) is not nn.Parameter
    with few_rows(others):
        assert replaced(others) == ["1"]
    assert others[1].forward is theirs
    for dtype in (torch.float64, torch.bfloat16):
        with few_rows(some := model(dtype=dtype)):
            assert replaced(some) == []


def test_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fewest", lambda: MOST + 1)
    with few_rows(some := model()):
        assert replaced(some) == []


@pytest.mark.parametrize(
    ("mkl", "capability", "threads", "expected"),
    [
        (True, "AVX512", 1, 4),
        (True, "AVX512", 2, 4),
        (True, "AVX2", 1, MOST + 1),
        (True, "AVX2", 2, 2),
        (True, "DEFAULT", 1, MOST + 1),
        (False, "AVX512", 1, MOST + 1),
        (False, "AVX2", 2, MOST + 1),
    ],
)
def test_where_it_pays(
    mkl: bool, capability: str, threads: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor and the threads decide, so that every run on a machine rounds alike."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert fewest() == expected


@pytest.mark.long_unless(lambda family: family in ("llama", "gpt2"))  # it is about nn.Linear
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_steered_rows_and_rungs_are_what_they_are_without(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family in float64, all linear maps in pieces: a mixed batch, and rungs where attention can be steered."""
    some = tiny.tiny(family)
    prompts = [tiny.prompt(seed, length) for seed, length in enumerate((4, 9, 6, 7, 5))]
    steering = Steering((Edit(Site(1), Add(tiny.direction(1, 2.0))),))
    steerings = [steering, None, 0.5 * steering, None, steering]
    ways: list[dict[str, Any]] = [{"steering": steerings}]
    ways += [
        {"steering": steerings, "rejection": Rejection(schedule=schedule, min_layers=1)}
        for schedule in ("optimistic", "fused")
        if family in CAN_REJECT
    ]
    used = []
    for options in ways:
        with monkeypatch.context() as patch:
            plain = some.generate(prompts, max_new_tokens=5, logprobs=True, **options)
            patch.setattr(module, "_suits", lambda m: type(m) is nn.Linear and "forward" not in vars(m))
            patch.setattr(module, "in_pieces", lambda *g: used.append(len(g[0])) or in_pieces(*g))
            pieces = some.generate(prompts, max_new_tokens=5, logprobs=True, **options)
        for a, b in zip(pieces, plain, strict=True):
            assert a.token_ids == b.token_ids
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-9)
    assert used or not any(type(m) is nn.Linear for m in some.model.modules())


def test_what_runs_inside_steered_keeps_its_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    some = tiny.tiny("llama")
    monkeypatch.setattr(module, "_suits", lambda m: type(m) is nn.Linear and "forward" not in vars(m))
    with some.steered(Steering((Edit(Site(1), Add(tiny.direction(1))),))):
        some.model(torch.ones(1, 3, dtype=torch.long))
        assert replaced(some.model) == []


def test_gradients_flow() -> None:
    some, x = model(), torch.randn(6, 300, requires_grad=True)
    some(x).square().sum().backward()
    expected = [x.grad.clone(), *(p.grad.clone() for p in some.parameters())]
    x.grad = None
    some.zero_grad()
    with few_rows(some):
        some(x).square().sum().backward()
    for ours, theirs in zip([x.grad, *(p.grad for p in some.parameters())], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.real
@pytest.mark.long
@pytest.mark.parametrize("rows", [3, 4, 8, 15])
def test_the_default_model_answers_as_without(lm: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"Write a line about the number {i}." for i in range(rows)]
    used = []
    monkeypatch.setattr(module, "in_pieces", lambda *arguments: used.append(1) or in_pieces(*arguments))
    ours = lm.generate(prompts, max_new_tokens=6, logprobs=True)
    assert used
    monkeypatch.setattr(module, "fewest", lambda: MOST + 1)
    theirs = lm.generate(prompts, max_new_tokens=6, logprobs=True)
    for mine, their in zip(ours, theirs, strict=True):
        pairs = list(zip(mine.token_ids, their.token_ids, strict=False))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        # with several threads sums are rounded otherwise, and a tie may fall otherwise: between equally likely tokens
        compared = min(same + 1, len(pairs))
        assert mine.logprobs[:compared] == pytest.approx(their.logprobs[:compared], abs=1e-3)
        assert same > 0
