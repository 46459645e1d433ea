"""Random controls: as long as the real push, in no direction in particular."""

import pytest
import torch
from tiny import direction, prompt, tiny

from trimtab.errors import TrimtabError
from trimtab.evaluate.controls import means_for, orthogonal_like, random_like
from trimtab.steering import Ablate, Add, Card, Edit, Positions, SetProjection, Site, Steering, Threshold

GATE = Threshold(Site(0), direction(9), 0.5)
REAL = Steering(
    (
        Edit(Site(1), Add(direction(1, 3.0).float()), Positions.all(), 2.0),
        Edit(Site(2), SetProjection(direction(2), 4.0, keep_norm=True), strength=0.5, gate=GATE),
        Edit(Site(3), Ablate(direction(2))),
    ),
    Card("instruct"),
)


def test_all_but_the_directions_stays():
    control = random_like(REAL, 7)
    for mine, real in zip(control.edits, REAL.edits, strict=True):
        assert (mine.site, mine.positions, mine.strength, mine.gate) == (
            real.site,
            real.positions,
            real.strength,
            real.gate,
        )
        a, b = mine.operation, real.operation
        assert (type(a), a.keep_norm, a.direction.dtype) == (type(b), b.keep_norm, b.direction.dtype)
        assert float(a.direction.norm()) == pytest.approx(float(b.direction.norm()), rel=1e-6)
        assert abs(float(torch.cosine_similarity(a.direction, b.direction, dim=0))) < 0.7
    assert control.edits[1].operation.target == 4.0
    assert torch.equal(control.edits[1].operation.direction, control.edits[2].operation.direction)
    assert control.card.method == "random"
    assert control.card.options["seed"] == 7


def test_the_seed_decides():
    assert random_like(REAL, 1) == random_like(REAL, 1)
    assert random_like(REAL, 1) != random_like(REAL, 2)


def test_directions_are_even_over_the_sphere():
    steering = Steering((Edit(Site(0), Add(direction(0))),))
    drawn = torch.stack([random_like(steering, seed).edits[0].operation.direction for seed in range(400)])
    assert drawn.mean(0).norm() < 0.1
    assert (drawn.T @ drawn / 400 * 32 - torch.eye(32)).abs().max() < 0.5


def test_an_added_control_is_as_long_as_the_steering():
    lm = tiny("llama")
    real = Steering(REAL.edits[:1])
    site, text = Site(1), prompt(0, 6)
    plain = lm.capture(text, [site])[0][site]
    for steering in (real, random_like(real, 3)):
        with lm.steered(steering):
            moved = lm.capture(text, [site])[0][site] - plain
        assert float(moved.norm()) == pytest.approx(6.0, rel=1e-6)


def test_with_means_a_set_projection_pushes_a_mean_activation_as_far():
    mean = 5 * torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real = Steering(REAL.edits[1:2])
    control = random_like(real, 3, {Site(2): mean})
    pushes = [s.edits[0].operation.target - float(mean @ s.edits[0].operation.direction) for s in (real, control)]
    assert pushes[0] == pytest.approx(pushes[1])
    with pytest.raises(TrimtabError, match=r"no mean activation of residual\[2\]"):
        random_like(real, 3, {Site(1): mean})
    with pytest.raises(TrimtabError, match="shape"):
        random_like(real, 3, {Site(2): mean[:5]})


def test_means_are_read_where_projections_are_set_and_nowhere_else():
    lm = tiny("llama")
    prompts = [prompt(1, 5), prompt(2, 9)]
    means = means_for(lm, [REAL], prompts)
    last = [lm.capture(text, [Site(2)])[0][Site(2)][-1] for text in prompts]  # one prompt at a time
    assert set(means) == {Site(2)}
    torch.testing.assert_close(means[Site(2)], (last[0] + last[1]) / 2)
    assert means_for(lm, [Steering(REAL.edits[:1], Card("caa"))], prompts) is None


def test_orthogonal_directions_have_nothing_of_the_steerings_own():
    own = Steering((Edit(Site(1), Add(direction(1, 3.0))), Edit(Site(2), SetProjection(direction(2), 3.0))))
    mean = direction(5, 2.0)
    control = orthogonal_like(own, 3, {Site(2): mean})
    for old, new in zip(own.edits, control.edits, strict=True):
        a, b = old.operation.direction, new.operation.direction
        assert abs(float(a @ b)) < 1e-9
        assert float(a.norm()) == pytest.approx(float(b.norm()))
        assert (new.site, new.positions, new.strength, new.gate) == (old.site, old.positions, old.strength, old.gate)
    pushes = [
        edit.operation.target - float(mean @ edit.operation.direction) for edit in (own.edits[1], control.edits[1])
    ]
    assert pushes[0] == pytest.approx(pushes[1])
    again = orthogonal_like(own, 3, {Site(2): mean})
    assert all(
        torch.equal(a.operation.direction, b.operation.direction)
        for a, b in zip(control.edits, again.edits, strict=True)
    )


def test_what_has_no_direction_of_its_own_to_avoid_is_as_random():
    own = Steering((Edit(Site(3), Ablate(direction(2))),))
    (drawn,), (control,) = random_like(own, 4).edits, orthogonal_like(own, 4).edits
    assert torch.equal(drawn.operation.direction, control.operation.direction)
