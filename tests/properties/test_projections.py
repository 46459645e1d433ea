"""Projections set together: each comes to where it was asked to be, and nothing else moves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import direction, naive_generate, naive_projections, prompt
from torch import Tensor

from trimtab import LM, Ablate, Add, Edit, Positions, SetProjection, Site, Steering, Threshold, TrimtabError
from trimtab.engines.transformers.plan import compile_plan

ALL = Positions.all()
PROMPTS = [prompt(seed, length) for seed, length in enumerate((4, 9, 6, 13, 5))]
NEW = 5


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2", "gemma2"])
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


def tolerance(lm: LM) -> float:
    """What norms and rotary embeddings in float32 leave exact; single-precision models less."""
    return 2e-3 if lm.model.dtype == torch.float32 else 1e-8


def clamp(seed: int, target: float, near: int | None = None, **more: object) -> SetProjection:
    """Along a random direction, or along one at an angle of about 40 degrees to that of `near`."""
    u = direction(seed) if near is None else direction(near) + 0.8 * direction(seed)
    return SetProjection(u / u.norm(), target, **more)  # type: ignore[arg-type]


def at(layer: int, *operations: object, strength: float = 1.0, positions: Positions = ALL) -> Steering:
    return Steering(tuple(Edit(Site(layer), op, positions, strength) for op in operations))  # type: ignore[arg-type]


def read(lm: LM, steering: Steering | None, layer: int = 2) -> Tensor:
    """The activations of a prompt's every token: `[tokens, width]`."""
    with lm.steered(steering or Steering()):
        (activations,) = lm.capture(PROMPTS[1], [layer], ALL)
    return activations[Site(layer)]


THREE = [clamp(1, 1.5), clamp(2, -3.0, near=1), clamp(3, 0.25, near=1)]


def test_the_directions_are_far_from_orthogonal() -> None:
    assert abs(float(THREE[0].direction @ THREE[1].direction)) > 0.5


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_target_is_hit_and_the_rest_stays(lm: LM, count: int) -> None:
    x, y = read(lm, None), read(lm, at(2, *THREE[:count]))
    for operation in THREE[:count]:
        landed = y @ operation.direction.to(y.dtype)
        assert torch.allclose(landed, torch.full_like(landed, operation.target), atol=tolerance(lm))
    basis, _ = torch.linalg.qr(torch.stack([op.direction for op in THREE[:count]]).T)
    basis = basis.to(x.dtype)
    orthogonal = [z - (z @ basis) @ basis.T for z in (x, y)]
    assert torch.allclose(*orthogonal, atol=tolerance(lm))
    assert not torch.allclose(x, y, atol=1e-2)


def test_applying_twice_is_applying_once(lm: LM) -> None:
    once, twice = at(2, *THREE), at(2, *THREE, *THREE)
    assert torch.allclose(read(lm, once), read(lm, twice), atol=tolerance(lm))
    between = at(2, *THREE, Add(torch.zeros(tiny.WIDTH)), *THREE)  # not neighbours: two steps, the second idle
    assert torch.allclose(read(lm, once), read(lm, between), atol=tolerance(lm))


def test_order_does_not_matter(lm: LM) -> None:
    orders = [read(lm, at(2, *order)) for order in itertools.permutations(THREE)]
    for other in orders[1:]:
        assert torch.allclose(orders[0], other, atol=tolerance(lm))


def test_one_after_the_other_would_miss() -> None:
    """What the joint step is for: in sequence, the first of two clamps at an angle is undone by the second."""
    x, (a, b) = torch.randn(tiny.WIDTH, dtype=torch.float64), THREE[:2]
    for op in (a, b):
        x = x + (op.target - x @ op.direction) * op.direction
    assert abs(float(x @ a.direction) - a.target) > 0.1


@pytest.mark.parametrize("strength", [0.5, -1.0, 1.7])
def test_a_share_of_the_way(lm: LM, strength: float) -> None:
    x, y = read(lm, None), read(lm, at(2, *THREE, strength=strength))
    for operation in THREE:
        u = operation.direction.to(x.dtype)
        expected = x @ u + strength * (operation.target - x @ u)
        assert torch.allclose(y @ u, expected, atol=tolerance(lm))


def test_strength_zero_is_identical(lm: LM) -> None:
    assert torch.equal(read(lm, None), read(lm, at(2, *THREE, strength=0.0)))
    assert torch.equal(read(lm, at(2, THREE[0])), read(lm, at(2, THREE[0]) + at(2, *THREE[1:], strength=0.0)))


def test_one_alone_is_the_formula(lm: LM) -> None:
    x = read(lm, None)
    u = THREE[1].direction.to(x.dtype)
    expected = x + (THREE[1].target - x @ u)[:, None] * u
    assert torch.allclose(read(lm, at(2, THREE[1])), expected, atol=tolerance(lm))


def test_with_an_ablation(lm: LM) -> None:
    y = read(lm, at(2, THREE[0], Ablate(THREE[1].direction)))
    for operation, target in ((THREE[0], THREE[0].target), (THREE[1], 0.0)):
        landed = y @ operation.direction.to(y.dtype)
        assert torch.allclose(landed, torch.full_like(landed, target), atol=tolerance(lm))


class TestOneSided:
    def test_it_raises_and_never_lowers(self, lm: LM) -> None:
        x = read(lm, None)
        u = direction(4).to(x.dtype)
        target = float((x @ u).median()) - 1e-3  # at no token exactly
        y = read(lm, at(2, SetProjection(direction(4), target, one_sided=True)))
        low = x @ u < target
        assert 0 < int(low.sum()) < len(low)
        assert torch.allclose((y @ u)[low], torch.full_like((y @ u)[low], target), atol=tolerance(lm))
        assert torch.equal(x[~low], y[~low])

    def test_beside_others_it_asks_to_stay(self, lm: LM) -> None:
        x = read(lm, None)
        u = THREE[1].direction.to(x.dtype)
        target = float((x @ u).median())
        y = read(lm, at(2, THREE[0], SetProjection(THREE[1].direction, target, one_sided=True)))
        assert torch.allclose(y @ u, (x @ u).clamp(min=target), atol=tolerance(lm))
        landed = y @ THREE[0].direction.to(y.dtype)
        assert torch.allclose(landed, torch.full_like(landed, 1.5), atol=tolerance(lm))


# No, one, two and three clamps at a layer, other operations between them, positions that differ, one-sided ones.
MIXED = [
    at(1, *THREE),
    None,
    at(1, THREE[0]) + at(3, Ablate(direction(6))),
    at(1, THREE[0]) + at(1, THREE[2], positions=Positions.generated()) + at(2, *THREE[:2], strength=0.5),
    at(1, clamp(5, 3.0, one_sided=True), THREE[0], Add(direction(7)), THREE[1], THREE[2])
    + at(1, SetProjection(direction(8), 1.0, keep_norm=True), clamp(9, 1.0)),
]


class TestMixedBatches:
    def test_equal_the_naive_reference_row_by_row(self, lm: LM) -> None:
        answers = lm.generate(PROMPTS, MIXED, max_new_tokens=NEW, logprobs=True)
        for text, acting, answer in zip(PROMPTS, MIXED, answers, strict=True):
            tokens, logprobs = naive_generate(lm, text, acting, NEW)
            assert list(answer.token_ids) == tokens
            assert answer.logprobs == pytest.approx(logprobs, abs=2e-3 if lm.name == "tiny-gemma2" else 1e-4)

    def test_the_cache_and_chunks_change_nothing(self, lm: LM) -> None:
        reference = [a.token_ids for a in lm.generate(PROMPTS, MIXED, max_new_tokens=NEW)]
        for way in ({"use_cache": False}, {"prefill_chunk_size": 4}, {"batch_size": 2}):
            assert [a.token_ids for a in lm.generate(PROMPTS, MIXED, max_new_tokens=NEW, **way)] == reference  # type: ignore[arg-type]

    def test_the_unsteered_row_is_bit_identical(self, lm: LM) -> None:
        steered = lm.generate(PROMPTS, MIXED, max_new_tokens=NEW, logprobs=True)[1]
        plain = lm.generate(PROMPTS, max_new_tokens=NEW, logprobs=True)[1]
        assert (steered.token_ids, steered.logprobs) == (plain.token_ids, plain.logprobs)

    def test_one_stage_for_any_number_of_clamps(self) -> None:
        """A layer calls the kernel once, however many projections each of the requests sets there."""
        requests = [at(1, *THREE[:count]).edits for count in range(4)]
        (stage,) = compile_plan(requests, [4] * 4, torch.float32).stages[Site(1)]
        assert {name for name in stage.rows if name.startswith("weight")} == {f"weight.{i}" for i in range(3)}


class TestWhatCannotBeMadeTrue:
    @pytest.mark.parametrize(
        "other",
        [
            SetProjection(direction(1), 1.6),
            SetProjection(-direction(1), 1.5),
            Ablate(direction(1)),
            SetProjection(direction(1), 1.5, one_sided=True),
            SetProjection(torch.nn.functional.normalize(direction(1) + 1e-3 * direction(2), dim=0), 1.5),
        ],
        ids=["another target", "opposed", "ablated", "one-sided", "nearly parallel"],
    )
    def test_two_ends_of_one_direction(self, lm: LM, other: object) -> None:
        lm.generate(PROMPTS[0], at(2, THREE[0]), max_new_tokens=1)  # the first call also probes how the model runs
        ran = []
        handle = lm.layout.blocks[0].register_forward_hook(lambda *_: ran.append(1))
        try:
            with pytest.raises(TrimtabError, match="to different targets") as caught:
                lm.generate(PROMPTS[0], at(2, THREE[0], other), max_new_tokens=1)
        finally:
            handle.remove()
        assert not ran
        for edit in at(2, THREE[0], other).edits:
            assert str(edit) in str(caught.value)

    def test_only_at_some_tokens(self, lm: LM) -> None:
        """Apart they're fine; where both act, it is said before the first token."""
        other = SetProjection(direction(1), -1.0)
        apart = at(2, THREE[0], positions=Positions.prompt()) + at(2, other, positions=Positions.generated())
        assert lm.generate(PROMPTS[0], apart, max_new_tokens=2)
        both = at(2, THREE[0], positions=Positions.prompt()) + at(2, other, positions=Positions.last_prompt_token())
        with pytest.raises(TrimtabError, match="to different targets"):
            lm.generate(PROMPTS[0], both, max_new_tokens=2)
        shut = Threshold(Site(0), direction(1), 1e9)
        assert lm.generate(PROMPTS[0], at(2, THREE[0]) + at(2, other).when(shut), max_new_tokens=1)

    def test_the_same_thing_twice_is_fine(self, lm: LM) -> None:
        reference = read(lm, at(2, THREE[0]))
        for again in (THREE[0], SetProjection(-direction(1), -1.5)):
            assert torch.allclose(read(lm, at(2, THREE[0], again)), reference, atol=tolerance(lm))

    def test_a_direction_made_of_two_others(self, lm: LM) -> None:
        u = THREE[0].direction + THREE[1].direction
        three = at(2, *THREE[:2], SetProjection(u / u.norm(), 1.0))
        with pytest.raises(TrimtabError, match=r"nearly\) a linear combination of the others"):
            lm.generate(PROMPTS[0], three, max_new_tokens=1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.floats(-5, 5), st.floats(-2, 2), st.booleans()), min_size=1, max_size=5
    )
)
def test_any_number_of_any_kind(clamps: Sequence[tuple[int, float, float, bool]]) -> None:
    """The bank's rows, run on random activations, against least squares."""
    unique = {seed: (target, strength or 1.0, sided) for seed, target, strength, sided in clamps}
    edits = tuple(
        Edit(Site(0), clamp(seed, target, one_sided=sided), ALL, strength)
        for seed, (target, strength, sided) in unique.items()
    )
    (stage,) = compile_plan([edits], [3], torch.float64).stages[Site(0)]
    x = torch.randn(7, tiny.WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = stage.kernel(x, {name: bank[1].expand(7, -1) for name, bank in stage.rows.items()})
    expected = torch.stack([naive_projections(edits, row) for row in x])
    assert torch.allclose(moved, expected, atol=1e-9)
