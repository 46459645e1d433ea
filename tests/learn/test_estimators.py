"""Estimators: each against its definition written out, what holds of all of them, and methods that take one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import prompt
from torch import Tensor

from trimtab import LM, Site, TrimtabError, learn_caa, learn_icv, learn_repe, load, save
from trimtab.engines.transformers.read import Text
from trimtab.learn.contrast import contrast_many
from trimtab.learn.estimators import (
    ESTIMATORS,
    Estimator,
    as_estimator,
    estimate,
    estimator_name,
    mean_difference,
    median,
    pca,
    probe,
    random_order,
    unit,
)
from trimtab.learn.moments import PairMembers, PairMoments
from trimtab.methods.caa import learn_behaviours
from trimtab.text.pairs import Pair

WIDTH = 12
ALL: dict[str, Estimator] = {**ESTIMATORS, "random-order": random_order(3)}
PAIRS = [Pair(prompt(i, 3), prompt(100 + i, 4 + i % 3), prompt(200 + i, 5), "answers") for i in range(7)]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


def sides(seed: int, pairs: int, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Noise, and a shift between the sides, so that there is a direction to find."""
    draw = torch.Generator().manual_seed(seed)
    shared, noise = torch.randn(2, pairs, width, generator=draw, dtype=torch.float64)
    return shared + 1, shared + 0.5 * noise


# ---- definitions ---------------------------------------------------------------------------------------------------


def naive_mean(positive: Tensor, negative: Tensor) -> Tensor:
    pairs, width = positive.shape
    return torch.tensor(
        [sum(float(positive[p, i] - negative[p, i]) for p in range(pairs)) / pairs for i in range(width)]
    ).double()


def naive_median(positive: Tensor, negative: Tensor) -> Tensor:
    import statistics

    columns = (positive - negative).T.tolist()
    return torch.tensor([statistics.median(column) for column in columns], dtype=torch.float64)


def naive_pca(positive: Tensor, negative: Tensor) -> Tensor:
    """The eigenvector of the members' scatter about their pairs' means, found by taking its power many times."""
    scatter = torch.zeros(positive.shape[1], positive.shape[1], dtype=torch.float64)
    for plus, minus in zip(positive, negative, strict=True):
        for member in (plus, minus):
            centred = member - (plus + minus) / 2
            scatter += torch.outer(centred, centred)
    v = naive_mean(positive, negative)  # which begins on the side of the positives
    for _ in range(3000):
        v = scatter @ v
        v = v / v.norm()
    return v * abs(float(naive_mean(positive, negative) @ v))


def naive_probe(positive: Tensor, negative: Tensor) -> Tensor:
    """Gradient descent on the penalised loss, over all of the width."""
    members = torch.cat([positive, negative])
    x = members - members.mean(0)
    x = x / x.square().mean().sqrt()
    y = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
    weight, bias = torch.zeros(x.shape[1], dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    rate = 1 / (float(torch.linalg.matrix_norm(x, 2)) ** 2 / 4 + len(x) / 4 + 1)
    for _ in range(20000):
        error = (x @ weight + bias).sigmoid() - y
        weight, bias = weight - rate * (x.T @ error + weight), bias - rate * error.sum()
    v = weight / weight.norm()
    return v * abs(float(naive_mean(positive, negative) @ v))


NAIVE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean-difference": naive_mean,
    "median": naive_median,
    "pca": naive_pca,
    "probe": naive_probe,
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(("pairs", "width"), [(9, 4), (4, 12), (7, 7)])
def test_the_definition(name: str, pairs: int, width: int) -> None:
    plus, minus = sides(pairs, pairs, width)
    assert torch.allclose(ESTIMATORS[name](plus, minus), NAIVE[name](plus, minus), atol=1e-6)


# ---- what holds of all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), pairs=st.integers(2, 20))
def test_sides_that_are_swapped_negate_it(name: str, seed: int, pairs: int) -> None:
    plus, minus = sides(seed, pairs)
    assert torch.allclose(ALL[name](minus, plus), -ALL[name](plus, minus), atol=1e-7)


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), pairs=st.integers(2, 20), factor=st.floats(1e-3, 1e3))
def test_it_is_as_large_as_the_activations(name: str, seed: int, pairs: int, factor: float) -> None:
    plus, minus = sides(seed, pairs)
    direction = ALL[name](plus, minus)
    assert torch.allclose(ALL[name](factor * plus, factor * minus), factor * direction, rtol=1e-6, atol=1e-7 * factor)


@pytest.mark.parametrize("name", ESTIMATORS)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), pairs=st.integers(2, 20))
def test_the_order_of_pairs_is_nothing_to_it(name: str, seed: int, pairs: int) -> None:
    plus, minus = sides(seed, pairs)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(ALL[name](plus[order], minus[order]), ALL[name](plus, minus), atol=1e-7)


@pytest.mark.parametrize("name", ["mean-difference", "median", "pca", "random-order"])
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), pairs=st.integers(2, 20))
def test_what_both_sides_of_a_pair_share_is_nothing_to_it(name: str, seed: int, pairs: int) -> None:
    plus, minus = sides(seed, pairs)
    shared = 10 * torch.randn(pairs, WIDTH, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    assert torch.allclose(ALL[name](plus + shared, minus + shared), ALL[name](plus, minus), atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_a_planted_direction_is_found_at_its_length(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    planted = tiny.direction(5).double()
    planted = 3 * planted / planted.norm()
    noise = torch.randn(2, 600, len(planted), generator=draw, dtype=torch.float64)
    direction = ALL[name](noise[0] + planted, noise[1])
    assert float(torch.cosine_similarity(direction, planted, dim=0)) > 0.95
    assert float(direction.norm()) == pytest.approx(3, rel=0.1)


def test_one_odd_pair_moves_the_mean_and_not_the_median() -> None:
    plus, minus = sides(0, 21)
    odd = plus.clone()
    odd[4] += 1e6
    assert (mean_difference(odd, minus) - mean_difference(plus, minus)).abs().max() > 1e4
    assert (median(odd, minus) - median(plus, minus)).abs().max() < 2


def test_sides_that_do_not_differ_have_no_direction() -> None:
    same, _ = sides(0, 5)
    for estimator in (pca, probe, random_order()):
        with pytest.raises(TrimtabError, match="don't differ"):
            estimator(same, same)
    with pytest.raises(TrimtabError, match="don't differ"):
        unit(mean_difference(same, same))


# ---- what is given -------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert as_estimator("median") is median
    assert as_estimator(probe) is probe
    assert estimator_name(pca) == estimator_name("pca") == "pca"
    assert estimator_name(naive_mean) == f"{__name__}:naive_mean"
    for wrong in ("mode", 3, None):
        with pytest.raises(TrimtabError, match=r"no estimator .*; estimators: mean-difference, median, pca, probe, or"):
            as_estimator(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gives", "why"),
    [
        (lambda p, n: None, "returned NoneType; a direction is a floating-point tensor of shape \\[12\\]"),
        (lambda p, n: p - n, "returned torch.float64 of shape \\[5, 12\\]"),
        (lambda p, n: p[0].long(), "returned torch.int64 of shape \\[12\\]"),
        (lambda p, n: p[0] * float("nan"), "NaN or infinite"),
    ],
)
def test_what_is_no_direction(gives: Estimator, why: str) -> None:
    with pytest.raises(TrimtabError, match=why):
        estimate(gives, *sides(0, 5))


def test_an_estimator_sees_float64_and_may_answer_in_float32() -> None:
    def seen(positive: Tensor, negative: Tensor) -> Tensor:
        assert positive.dtype == negative.dtype == torch.float64
        return (positive - negative).mean(0).float()

    plus, minus = (side.bfloat16() for side in sides(0, 5))
    assert estimate(seen, plus, minus).dtype == torch.float64


# ---- methods take one ----------------------------------------------------------------------------------------------


def read(lm: LM, layer: int) -> tuple[Tensor, Tensor]:
    """The last tokens of both sides' answers, each text alone."""
    both = []
    for which in ("positive", "negative"):
        texts = [f"{pair.prompt} {getattr(pair, which)}" for pair in PAIRS]
        both.append(torch.stack([lm.capture(text, [layer])[0][Site(layer)][-1] for text in texts]))
    return both[0].double(), both[1].double()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_caa_adds_what_the_estimator_gives(lm: LM, name: str, tmp_path: object) -> None:
    steering = learn_caa(lm, PAIRS, [1, 2], estimator=name)
    for edit in steering.edits:
        expected = NAIVE[name](*read(lm, edit.site.layer))
        assert torch.allclose(edit.operation.direction.double(), expected, atol=1e-4), edit
    assert steering == learn_caa(lm, PAIRS, [1, 2], estimator=ESTIMATORS[name])
    assert steering.card.options.get("estimator", "mean-difference") == name
    save(steering, f"{tmp_path}/s.safetensors")
    assert load(f"{tmp_path}/s.safetensors").card == steering.card


def test_a_new_direction_is_a_function(lm: LM) -> None:
    def first_pair(positive: Tensor, negative: Tensor) -> Tensor:
        return positive[0] - negative[0]

    (edit,) = learn_caa(lm, PAIRS[:1], 2, estimator=first_pair).edits
    (mean,) = learn_caa(lm, PAIRS[:1], 2).edits
    assert torch.allclose(edit.operation.direction, mean.operation.direction, atol=1e-6)
    card = learn_caa(lm, PAIRS, 2, estimator=first_pair).card
    assert card.options["estimator"].endswith("first_pair")
    with pytest.raises(TrimtabError, match=r"layer 2: the estimator .* returned"):
        learn_caa(lm, PAIRS, 2, estimator=lambda positive, negative: positive)


@pytest.mark.parametrize("norm", ["unit", "relative"])
def test_lengths_are_the_methods_own(lm: LM, norm: str) -> None:
    raw, scaled = (learn_caa(lm, PAIRS, 2, estimator="median", norm=n).edits[0].operation for n in ("raw", norm))
    along = float(torch.cosine_similarity(raw.direction, scaled.direction, dim=0))
    assert along == pytest.approx(1, abs=1e-6)
    (mean,) = learn_caa(lm, PAIRS, 2, norm=norm).edits
    assert float(scaled.direction.norm()) == pytest.approx(float(mean.operation.direction.norm()), rel=1e-5)


def test_the_mean_keeps_sums_and_others_keep_what_they_need(lm: LM) -> None:
    texts = [(Text(lm.encode(p.positive), [2]), Text(lm.encode(p.negative), [1])) for p in PAIRS]
    sums = contrast_many(lm, {"a": texts, "b": texts[:3]}, [1, 2])
    kept = contrast_many(lm, {"a": texts, "b": texts[:3]}, [1, 2], moments_type=PairMembers)
    for name, layer in (("a", 1), ("a", 2), ("b", 1), ("b", 2)):
        summed, all_of_it = sums[name][layer], kept[name][layer]
        assert type(summed) is PairMoments
        assert summed.count == all_of_it.count == sum(len(plus) for plus, _ in all_of_it.members)
        assert torch.equal(summed.difference, all_of_it.difference)
        assert torch.allclose(summed.difference, all_of_it.estimate_direction(mean_difference), atol=1e-12)


def test_several_behaviours_have_the_estimator_each(lm: LM) -> None:
    learned = learn_behaviours(lm, {"a": PAIRS, "b": PAIRS[:4]}, 2, estimator="pca")
    for name, pairs in (("a", PAIRS), ("b", PAIRS[:4])):
        expected = learn_caa(lm, pairs, 2, estimator="pca").edits[0].operation.direction
        assert torch.allclose(learned[name].edits[0].operation.direction, expected, atol=1e-5)


def test_repe_and_icv_take_one(lm: LM) -> None:
    assert learn_repe(lm, PAIRS, 2, reader=mean_difference) == learn_repe(lm, PAIRS, 2, reader="cluster-mean")
    assert learn_repe(lm, PAIRS, 2, reader=pca).card == learn_repe(lm, PAIRS, 2).card
    assert learn_icv(lm, PAIRS, estimator=mean_difference) == learn_icv(lm, PAIRS)
    by_probe = learn_repe(lm, PAIRS, 2, reader="probe").edits[0].operation.direction.double()
    assert torch.allclose(by_probe, unit(naive_probe(*read(lm, 2))), atol=1e-4)
    with pytest.raises(TrimtabError, match="no estimator 'mode'; estimators: pca, random-order, cluster-mean"):
        learn_repe(lm, PAIRS, 2, reader="mode")
    with pytest.raises(TrimtabError, match="no estimator 'mode'; estimators: mean"):
        learn_icv(lm, PAIRS, estimator="mode")
