"""What is trained: as a change of a pass and as an edit, its cap, its doses and its beginning."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from tiny import WIDTH, prompt
from torch import Tensor

from trimtab import LM, Add, Positions, ReadWrite, Site, Steering, TrimtabError
from trimtab.engines.transformers.forced import PromptAnswer, teacher_forcing
from trimtab.learn.parameters import LowRankParameters, SiteParameters, typical_scales

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


def part(rank: int, seed: int = 0, scale: float = 1.7) -> SiteParameters:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(WIDTH, generator=generator)
    read, write = (torch.randn(rank, WIDTH, generator=generator) * 0.3 for _ in range(2))
    return SiteParameters(scale, vector, read, write)


def trained(rank: int) -> LowRankParameters:
    return LowRankParameters({Site(layer): part(rank, layer) for layer in (2, 0)})


def started(rank: int, seed: int = 0) -> LowRankParameters:
    return LowRankParameters.initial({Site(0): 1.0, Site(2): 3.0}, {Site(0): 8, Site(2): 6}, rank, seed, CPU)


@pytest.mark.parametrize("factor", [1.0, 0.5, -2.0, 0.0])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_change_is_what_its_operation_does(rank: int, factor: float) -> None:
    changing, x = part(rank), torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(9))
    operation = changing.operation()
    assert isinstance(operation, ReadWrite if rank else Add)
    if isinstance(operation, ReadWrite):
        assert operation.bias is not None
        expected = factor * ((x @ operation.read.T + operation.bias) @ operation.write)
    else:
        expected = factor * operation.direction.expand_as(x)
    assert changing.change(factor, x).shape == x.shape
    assert torch.allclose(changing.change(factor, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_change_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(9)).to(dtype)
    change = part(3).change(1.0, x)
    assert change.dtype == torch.float32
    assert torch.equal(change, part(3).change(1.0, x.float()))


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("rank", [0, 3])
def test_edits_steer_as_changes_change(lm: LM, rank: int, strength: float) -> None:
    question = prompt(3, 7)
    steering = strength * Steering(trained(rank).edits())
    (answer,) = lm.generate(question, steering, max_new_tokens=6, logprobs=True)
    text = PromptAnswer(tuple(lm.encode(question)), tuple(answer.token_ids))
    with teacher_forcing(lm.model, lm.layout, [Site(0), Site(2)]) as run, torch.no_grad():
        (logits,) = run.logits([text], trained(rank).changes(strength))
        (bare,) = run.logits([text], {})
    assert tuple(logits.argmax(-1).tolist()) == answer.token_ids
    logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(text.answer)[:, None])[:, 0]
    assert logprobs.tolist() == pytest.approx(answer.logprobs, abs=1e-4)
    assert not torch.allclose(logits, bare, atol=0.1)


def test_edits_are_in_the_order_of_their_sites() -> None:
    edits = trained(2).edits()
    assert [edit.site for edit in edits] == [Site(0), Site(2)]
    assert {edit.positions for edit in edits} == {Positions.from_last_prompt_token()}
    assert {edit.strength for edit in edits} == {1.0}
    assert {edit.positions for edit in trained(0).edits(Positions.all())} == {Positions.all()}


def test_at_the_beginning_nothing_is_added() -> None:
    for rank in (0, 4):
        start = started(rank)
        x = torch.randn(5, 8)
        assert torch.equal(start.by_site[Site(0)].change(1.0, x), torch.zeros(5, 8))
        assert all(tensor.requires_grad for tensor in start.tensors)
        assert len(start.tensors) == (6 if rank else 2)
        assert start.by_site[Site(2)].write.shape == (rank, 6)


def test_the_seed_decides_the_beginning() -> None:
    for a, b in zip(started(4).tensors, started(4).tensors, strict=True):
        assert torch.equal(a, b)
    reads = [started(4, seed).by_site[Site(2)].read for seed in (0, 1)]
    assert not torch.equal(*reads)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_activations_without_length_are_an_error(scale: float) -> None:
    with pytest.raises(TrimtabError, match=r"activations at residual\[1\] have norm .*; nothing can be learned"):
        LowRankParameters.initial({Site(1): scale}, {Site(1): 8}, 0, 0, CPU)


def test_the_cap_shortens_what_is_too_long_and_nothing_else() -> None:
    long, short = part(2, 0), part(2, 1)
    long.vector.mul_(3.0 * WIDTH**0.5 / long.vector.norm())
    short.vector.mul_(0.4 * WIDTH**0.5 / short.vector.norm())
    all_ = LowRankParameters(
        {Site(0): long, Site(1): short, Site(2): SiteParameters(1.0, torch.zeros(WIDTH), long.read, long.write)}
    )
    before = {site: kept_part.vector.clone() for site, kept_part in all_.by_site.items()}
    reads = long.read.clone()
    assert all_.doses() == pytest.approx({Site(0): 3.0, Site(1): 0.4, Site(2): 0.0}, rel=1e-5)
    all_.cap(0.5)
    assert all_.doses() == pytest.approx({Site(0): 0.5, Site(1): 0.4, Site(2): 0.0}, rel=1e-5)
    assert torch.allclose(all_.by_site[Site(0)].vector, before[Site(0)] / 6, rtol=1e-5)
    assert torch.equal(all_.by_site[Site(1)].vector, before[Site(1)])
    assert torch.equal(long.read, reads)


def test_a_dose_is_the_length_over_that_of_the_typical_activation() -> None:
    changing = part(0, scale=2.5)
    x = 2.5 * torch.ones(1, WIDTH)  # the root mean square of its elements is the scale
    assert LowRankParameters({Site(0): changing}).doses()[Site(0)] == pytest.approx(
        float(changing.change(1.0, x).norm() / x.norm())
    )


def test_copies_are_copies() -> None:
    start = started(3)
    frozen, moving = start.frozen(), start.trainable_copy()
    with torch.no_grad():
        for tensor in start.tensors:
            tensor.add_(1.0)
    for a, b, c in zip(frozen.tensors, moving.tensors, start.tensors, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert (a.requires_grad, b.requires_grad) == (False, True)


def test_the_typical_activation_is_no_outlier() -> None:
    """Its length is the median over tokens, which a hundredfold one doesn't move."""
    rows: list[Tensor] = [torch.full((3, 4), 2.0), torch.full((1, 4), 200.0), -torch.full((2, 4), 3.0)]
    assert typical_scales({Site(1): rows, Site(0): [x.bfloat16() for x in rows]}) == {Site(1): 2.0, Site(0): 2.0}
