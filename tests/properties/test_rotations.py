"""Rotations: norms stay, angles are as asked for, nothing fails near the plane; in a model as in the formula."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import WIDTH, direction, prompt
from torch import Tensor

from trimtab import LM, Edit, Positions, Site, Steering, TrimtabError, load, save
from trimtab.steering import Rotate, RotateInPlane, RotatePredicted
from trimtab.steering.operations import unit, with_norm_of
from trimtab.steering.rotations import angle_sizes, weight_count

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "falcon", "opt", "gpt_neox")
PROMPTS = [prompt(seed, length) for seed, length in enumerate((4, 9, 6, 13, 5))]
U = direction(2)


def turned(x: Tensor, operation: Any, strength: float = 1.0) -> Tensor:
    """As engines run it; and as the operation's own kernel does, where that is another."""
    kernel, row = operation.call(strength)
    result = kernel(x, {name: value.to(x.dtype) for name, value in row.items()})
    own = operation.kernel(x, {name: value.to(x.dtype) for name, value in operation.row(strength).items()})
    off = (x - (x @ operation.direction.to(x.dtype))[..., None] * operation.direction.to(x.dtype)).norm(dim=-1)
    plane = off > 1e-3 * x.norm(dim=-1)  # along the direction some kernels turn, and others leave it
    assert torch.allclose(
        result[plane], own[plane], rtol=0, atol=400 * float(x[plane].norm()) * torch.finfo(x.dtype).eps
    )
    return result


def published(x: Tensor, w: Tensor, gamma1: float) -> Tensor:
    """The paper's form, for one activation on the wrong side, with a Householder matrix."""
    if float(w @ x) >= 0:
        return x
    reflected = (torch.eye(len(x), dtype=x.dtype) - 2 * torch.outer(w, w) / (w @ w)) @ x
    gamma2 = torch.arccos((x @ reflected) / (x.norm() * reflected.norm()))
    return math.sin(gamma1) / torch.sin(gamma2) * reflected + torch.sin(gamma2 - gamma1) / torch.sin(gamma2) * x


def published_angle(x: Tensor, weights: Tensor) -> float:
    """The network, layer by layer, for one activation."""
    sizes, start = angle_sizes(len(x)), 0
    x = x / x.square().mean().sqrt()
    for i, (a, b) in enumerate(pairwise(sizes)):
        matrix = weights[start : start + a * b].reshape(b, a).to(x.dtype)
        x = matrix @ x + weights[start + a * b : start + a * b + b].to(x.dtype)
        start += a * b + b
        if i < len(sizes) - 2:
            x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return float(math.pi / (1 + torch.exp(-x)))


def network(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(weight_count(WIDTH), generator=generator, dtype=torch.float64) * 0.3


def at_angle(phi: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """An activation below the plane by phi."""
    side = direction(9) - (direction(9) @ U) * U
    return (3 * (math.cos(phi) * side / side.norm() - math.sin(phi) * U)).to(dtype)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 3.0])
def test_it_is_the_published_rotation(gamma: float) -> None:
    x = torch.randn(50, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rotated = turned(x, Rotate(U, gamma))
    expected = torch.stack([published(row, 5 * U, gamma) for row in x])
    assert torch.allclose(rotated, expected, atol=1e-9)
    below = x @ U < 0
    assert 0 < int(below.sum()) < 50
    assert torch.equal(rotated[~below], x[~below])


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("degrees", [0.0, 1e-6, 1e-3, 45.0, 90.0])
def test_the_norm_stays_and_nothing_fails_near_the_plane(dtype: torch.dtype, off: float, degrees: float) -> None:
    x = at_angle(math.radians(degrees), dtype)[None]
    for operation in (Rotate(U, 0.7), Rotate(U), Rotate(U, 0.7, one_sided=False), RotatePredicted(U, network())):
        y = turned(x, operation)
        assert bool(torch.isfinite(y).all())
        assert float((y.norm() - x.norm()).abs() / x.norm()) < off


def test_angles() -> None:
    phi = 0.4
    x = at_angle(phi)[None]
    y = turned(x, Rotate(U, 0.9))
    assert math.acos(float((x @ y.T)[0, 0] / 9)) == pytest.approx(0.9)
    assert float((y @ U)[0]) == pytest.approx(3 * math.sin(0.9 - phi))  # across the plane, as 0.9 > phi
    assert torch.allclose(turned(x, Rotate(U)), x - 2 * (x @ U)[:, None] * U)  # the reflection
    assert torch.allclose(turned(x, Rotate(U), 0.5) @ U, torch.zeros(1, dtype=x.dtype), atol=1e-12)
    assert torch.allclose(turned(x, Rotate(U, 0.9), 0.0), x)
    assert torch.allclose(turned(7 * x, Rotate(U, 0.9)), 7 * y)
    both = Rotate(U, None, one_sided=False)
    assert torch.allclose(turned(turned(x, both), both), x)
    along = -2 * U[None]  # has no plane to turn in
    assert torch.equal(turned(along, Rotate(U, 0.9)), along)


@pytest.mark.parametrize("operation", [Rotate(U), Rotate(U, 0.9), RotatePredicted(U, network())])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_activations_that_have_no_angle_stay(operation: Any, dtype: torch.dtype) -> None:
    side = torch.zeros(WIDTH, dtype=dtype)
    side[:2] = torch.tensor([U[1], -U[0]])  # its projection is 0, or all that rounding makes of it
    assert torch.equal(turned(torch.zeros(2, WIDTH, dtype=dtype), operation), torch.zeros(2, WIDTH, dtype=dtype))
    assert torch.allclose(turned(side[None] * 1e-3, operation).norm(), 1e-3 * side.norm(), rtol=1e-5)
    mixed = turned(torch.stack([at_angle(0.3, dtype), torch.full_like(side, torch.nan), side]), operation)
    assert bool(mixed[[0, 2]].isfinite().all())


def test_the_norm_is_kept_by_one_kernel_as_by_several() -> None:
    x, y = torch.randn(2, 5, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y[2] = 0
    wanted = torch.nan_to_num(y / y.norm(dim=-1, keepdim=True))
    for dtype, off in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        assert torch.allclose(unit(y.to(dtype)).double(), wanted, rtol=0, atol=off)
        several = with_norm_of(x.to(dtype), y.to(dtype)).double()
        assert torch.allclose(several, wanted * x.norm(dim=-1, keepdim=True), rtol=0, atol=20 * off)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_a_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.tiny(family)
    weights = network(3)
    operations = [Rotate(U, 0.8), Rotate(direction(4)), RotatePredicted(direction(5), weights)]
    rows: list[Steering | None] = [
        Steering((Edit(Site(1), operation, Positions.all()), Edit(Site(2), operation))) for operation in operations
    ]
    rows = [rows[0], None, rows[1], rows[2], 0.5 * rows[2]]  # type: ignore[operator]
    answers = lm.generate(PROMPTS, rows, max_new_tokens=5, logprobs=True)
    plain = lm.generate(PROMPTS, max_new_tokens=5, logprobs=True)
    assert answers[1].logprobs == plain[1].logprobs

    def literal(edit: Edit, x: Tensor) -> Tensor:
        operation, u = edit.operation, edit.operation.direction.to(x.dtype)
        if isinstance(operation, RotatePredicted):
            return published(x, u, edit.strength * published_angle(x, operation.weights))
        if operation.angle is None:
            return x - 2 * (x @ u) * u if float(x @ u) < 0 else x
        return published(x, u, edit.strength * operation.angle)

    monkeypatch.setattr(tiny, "naive_edit", literal)
    for i in (0, 2, 3, 4):
        tokens, logprobs = tiny.naive_generate(lm, PROMPTS[i], rows[i], 5)
        assert list(answers[i].token_ids) == tokens
        assert answers[i].logprobs == pytest.approx(logprobs, abs=1e-4)


def test_where_all_is_on_the_right_side_nothing_changes() -> None:
    lm: LM = tiny.tiny("llama")
    (activations,) = lm.capture(PROMPTS[1], [1], Positions.all())
    u = activations[Site(1)].mean(0)
    u = u / u.norm()
    if not bool((activations[Site(1)] @ u > 0).all()):  # turn to where they all are
        u = torch.linalg.pinv(activations[Site(1)]) @ torch.ones(len(activations[Site(1)]), dtype=u.dtype)
        u = u / u.norm()
    assert bool((activations[Site(1)] @ u > 0).all())
    steering = Steering((Edit(Site(1), RotatePredicted(u, network()), Positions.prompt()),))
    (answer,) = lm.generate(PROMPTS[1], steering, max_new_tokens=4, logprobs=True)
    (other,) = lm.generate(PROMPTS[1], max_new_tokens=4, logprobs=True)
    assert (answer.token_ids, answer.logprobs) == (other.token_ids, other.logprobs)


def test_files(tmp_path: Path) -> None:
    operations = (Rotate(U, 0.8), Rotate(U, one_sided=False), RotatePredicted(U, network()))
    steering = Steering(tuple(Edit(Site(i), operation) for i, operation in enumerate(operations)))
    save(steering, tmp_path / "turn.safetensors")
    assert load(tmp_path / "turn.safetensors") == steering


def test_bad_input() -> None:
    with pytest.raises(TrimtabError, match="unit vector"):
        Rotate(2 * U, 0.5)
    with pytest.raises(TrimtabError, match="finite number of radians"):
        Rotate(U, math.inf)
    with pytest.raises(TrimtabError, match=f"has {weight_count(WIDTH)} weights, got 3"):
        RotatePredicted(U, torch.ones(3))


class TestInAFixedPlane:
    V = torch.nn.functional.normalize(direction(3) + 0.5 * U, dim=0)

    @pytest.mark.parametrize("angle", [None, 0.0, 0.4, -2.0, 3.1])
    @pytest.mark.parametrize("strength", [1.0, 0.3, -0.5])
    def test_it_is_the_matrix(self, angle: float | None, strength: float) -> None:
        x = 3 * torch.randn(50, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        operation = RotateInPlane(U, self.V, angle)
        rotated = turned(x, operation, strength)
        expected = torch.stack([tiny.naive_turn(operation, row, strength) for row in x])
        assert torch.allclose(rotated, expected, atol=1e-12)
        assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1))
        basis, _ = torch.linalg.qr(torch.stack([U, self.V]).T)
        assert torch.allclose(*(z - z @ basis @ basis.T for z in (x, rotated)), atol=1e-12)

    def test_angles(self) -> None:
        between = math.acos(float(U @ self.V))
        assert torch.allclose(turned(U[None], RotateInPlane(U, self.V, between)), self.V[None])
        assert torch.allclose(turned(U[None], RotateInPlane(U, self.V)), self.V[None])
        half = turned(U[None], RotateInPlane(U, self.V), 0.5)[0]
        assert float(half @ U) == pytest.approx(float(half @ self.V)) == pytest.approx(math.cos(between / 2))
        x = torch.randn(20, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        basis, _ = torch.linalg.qr(torch.stack([U, self.V]).T)
        aimed = turned(x, RotateInPlane(U, self.V)) @ basis  # what is in the plane points along the second direction
        assert torch.allclose(aimed, (x @ basis).norm(dim=-1, keepdim=True) * (self.V @ basis), atol=1e-12)
        back = turned(turned(x, RotateInPlane(U, self.V, 0.7)), RotateInPlane(U, self.V, 0.7), -1.0)
        assert torch.allclose(back, x)
        off = x - x @ basis @ basis.T  # nothing in the plane: nothing to turn
        assert torch.allclose(turned(off, RotateInPlane(U, self.V)), off, atol=1e-12)

    def test_in_a_model_and_in_files(self, tmp_path: Path) -> None:
        lm = tiny.tiny("llama")
        steering = Steering(
            (Edit(Site(1), RotateInPlane(U, self.V)), Edit(Site(2), RotateInPlane(U, self.V, 0.5, keep_norm=0.5)))
        )
        rows = [steering, None, 0.5 * steering, steering.at(Positions.all()), -1 * steering]
        for text, row, answer in zip(PROMPTS, rows, lm.generate(PROMPTS, rows, max_new_tokens=5), strict=True):
            assert list(answer.token_ids) == tiny.naive_generate(lm, text, row, 5)[0]
        save(steering, tmp_path / "s.safetensors")
        assert load(tmp_path / "s.safetensors") == steering

    def test_bad_input(self) -> None:
        with pytest.raises(TrimtabError, match="don't span a plane"):
            RotateInPlane(U, -U)
        with pytest.raises(TrimtabError, match="second direction must be a unit vector"):
            RotateInPlane(U, 2 * self.V)
        with pytest.raises(TrimtabError, match="have the same width"):
            RotateInPlane(U, torch.eye(5)[0])
        with pytest.raises(TrimtabError, match="finite number of radians"):
            RotateInPlane(U, self.V, math.inf)
