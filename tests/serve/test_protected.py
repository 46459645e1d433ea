"""What is always on can't be cancelled: no edit of a request changes the stream's projection on its directions."""

from __future__ import annotations

import pytest
import torch

from trimtab import Ablate, Add, Edit, Positions, ScaleElements, SetProjection, Site, Steering, TrimtabError
from trimtab.steering import ScaleScores, emphasis

pytest.importorskip("fastapi", reason="serving needs trimtab[serve]")

from trimtab.serve.protected import Protected, protection_of, remove_protected

WIDTH = 32


def vector(seed: int, length: float = 1.0) -> torch.Tensor:
    v = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return length * v / v.norm()


def unit(v: torch.Tensor) -> torch.Tensor:
    return v / v.norm()


def edit(operation: object, layer: int = 1, kind: str = "residual") -> Edit:
    return Edit(Site(layer, kind), operation, Positions.all(), 1.7)


def naively(push: Edit, x: torch.Tensor) -> torch.Tensor:
    """What the edit's docstring says, in float64."""
    operation, v = push.operation, push.operation.direction.double()
    if isinstance(operation, Add):
        return x + push.strength * v
    target = operation.target if isinstance(operation, SetProjection) else 0.0
    return x + push.strength * (target - x @ v)[:, None] * v


ALWAYS = [
    ("safety", Steering((edit(Add(vector(1, 3.0)), 1), edit(SetProjection(vector(2), 2.0), 2)))),
    ("calm", Steering((edit(Ablate(vector(3)), 0),))),
]
OPERATIONS = [Add(vector(4, 2.0)), SetProjection(vector(5), 1.5), SetProjection(vector(6), -1.0, one_sided=False)]
OPERATIONS += [Ablate(vector(7)), Add(vector(1) + vector(8)), Ablate(unit(vector(1) + 0.3 * vector(9)))]


class TestProperties:
    @pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: type(operation).__name__)
    @pytest.mark.parametrize("layer", [0, 1, 3])
    @pytest.mark.parametrize("kind", ["residual", "block_input"])
    def test_the_streams_projection_on_what_is_always_on_stays(self, operation: object, layer: int, kind: str) -> None:
        held = protection_of(ALWAYS)
        left, lost = remove_protected(held, Steering((edit(operation, layer, kind),)))
        x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (moved,) = left.edits
        y = naively(moved, x)
        for seed in (1, 2, 3):
            v = vector(seed).double()
            assert torch.allclose(x @ v, y @ v, atol=1e-5), seed
        assert 0 < lost < 1
        assert not torch.allclose(x, y, atol=0.1)  # and it still acts
        assert (moved.site, moved.positions, moved.strength) == (Site(layer, kind), Positions.all(), 1.7)

    def test_it_is_the_nearest_such_push(self) -> None:
        v, held = vector(4, 2.0), protection_of(ALWAYS)
        left, lost = remove_protected(held, Steering((edit(Add(v)),)))
        three = torch.stack([vector(seed).double() for seed in (1, 2, 3)])
        along = three.T @ torch.linalg.solve(three @ three.T, three @ v.double())
        assert torch.allclose(left.edits[0].operation.direction.double(), v.double() - along, atol=1e-6)
        assert lost == pytest.approx(float(along.norm() / v.double().norm()))

    def test_what_has_nothing_along_it_is_the_same_object(self) -> None:
        held = protection_of([("safety", Steering((edit(Add(torch.eye(WIDTH)[0])),)))])
        mine = Steering((edit(Add(torch.eye(WIDTH)[1])), edit(Ablate(torch.eye(WIDTH)[2]))))
        left, lost = remove_protected(held, mine)
        assert lost == 0
        assert all(a is b for a, b in zip(left.edits, mine.edits, strict=True))

    def test_without_anything_that_is_always_on_nothing_changes(self) -> None:
        mine = ALWAYS[0][1]
        assert remove_protected(Protected(), mine) == (mine, 0.0)


class TestRefusals:
    @pytest.mark.parametrize("factor", [1.0, -1.0, 100.0, 1e-3])
    def test_the_same_direction_under_another_name(self, factor: float) -> None:
        with pytest.raises(TrimtabError, match="acts almost only along a steering that is always on"):
            remove_protected(protection_of(ALWAYS), Steering((edit(Add(factor * (vector(1) + vector(3))), 3),)))

    @pytest.mark.parametrize(
        "other",
        [
            edit(ScaleElements(torch.full((WIDTH,), 0.1))),
            edit(Add(vector(4), keep_norm=True)),
            edit(Add(vector(4)), kind="heads"),
            edit(Add(vector(4)), kind="mlp"),
        ],
        ids=["scale", "keep_norm", "heads", "mlp"],
    )
    def test_what_reaches_it_another_way(self, other: Edit) -> None:
        with pytest.raises(TrimtabError, match="could undo a steering that is always on"):
            remove_protected(protection_of(ALWAYS), Steering((other,)))

    def test_what_is_always_on_and_has_no_direction(self) -> None:
        held = protection_of([("dim", Steering((edit(ScaleElements(torch.full((WIDTH,), 0.5))),)))])
        with pytest.raises(TrimtabError, match="'dim' is always on and isn't made of directions"):
            remove_protected(held, Steering((edit(Add(vector(4))),)))

    def test_attention_can_be_steered(self) -> None:
        towards = emphasis(ScaleScores(), [(1, 3)], range(2), "directer")
        assert remove_protected(protection_of(ALWAYS), towards) == (towards, 0.0)
