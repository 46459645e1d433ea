from __future__ import annotations

import math
import pickle
import tracemalloc
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from trimtab import Ablate, Add, Always, Card, Edit, Positions, SetProjection, Site, Steering, Threshold, TrimtabError
from trimtab.steering import ReadWrite, RotatePredicted
from trimtab.steering.conditional import Conditional
from trimtab.steering.gates import Reading
from trimtab.steering.rotations import weight_count

U = torch.eye(8)[0]


def adding(layer: int = 1, strength: float = 1.0, **more: object) -> Steering:
    return Steering((Edit(Site(layer), Add(2 * U, **more), strength=strength),), Card(method=f"test{layer}"))  # type: ignore[arg-type]


def test_arithmetic() -> None:
    s, t = adding(1), adding(2)
    assert (2.0 * s).edits[0].strength == 2.0
    assert s * 2 == 2 * s
    assert -s == -1 * s
    assert -1 * -s == s
    assert (s / 4).edits[0].strength == 0.25
    assert (s + t).layers == (1, 2)
    assert sum([s, t]) == s + t
    assert s + t != t + s  # edits act in order
    assert (s - t).edits[1].strength == -1
    assert 3 * (s + t) == 3 * s + 3 * t
    assert [part.method for part in (s + t + s).card.parts] == ["test1", "test2", "test1"]
    assert Steering() + s == s
    assert (Steering() + s).card == s.card


def test_equality_and_hash_are_by_value() -> None:
    assert adding() == adding()
    assert hash(adding()) == hash(adding())
    assert adding() != adding(keep_norm=True)
    assert Add(U) != Ablate(U)
    assert Add(U) != Add(U.double())
    assert len({adding(), adding(), adding(2)}) == 2
    assert adding() == Steering(adding().edits, Card(method="another"))
    assert pickle.loads(pickle.dumps(adding())) == adding()


def wide() -> list[Any]:
    big = 1 << 20
    u = torch.zeros(big).index_fill(0, torch.tensor(0), 1.0)
    matrix = u[None]
    weights = torch.ones(weight_count(8))
    gate = Threshold(Site(1), u, 0.0, each_token=True)
    return [
        Add(u),
        ReadWrite(matrix, matrix),
        RotatePredicted(U, weights),
        gate,
        Conditional(Add(u), gate),
    ]


@pytest.mark.parametrize("made", wide(), ids=lambda made: type(made).__name__)
def test_tensors_are_hashed_once(made: Any) -> None:
    """A second hash copies nothing; and no hash goes to another process, where strings have other ones."""
    first = hash(made)
    tracemalloc.start()
    try:
        assert hash(made) == first
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
    if hasattr(made, "kernel"):
        assert made.kernel is not None
    state = made.__getstate__()
    assert not {"_hash", "kernel", "map"} & state.keys()
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    assert hash(again) == first


def test_plain_data_cannot_be_changed() -> None:
    vector = 2 * U
    operation = Add(vector)
    vector.zero_()
    assert operation.direction.norm() == 2
    with pytest.raises(FrozenInstanceError):
        adding().edits = ()  # type: ignore[misc]


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, "2", None, True])
def test_a_strength_is_a_finite_number(strength: object) -> None:
    with pytest.raises(TrimtabError, match="finite number"):
        adding(strength=strength)  # type: ignore[arg-type]
    if isinstance(strength, float):
        with pytest.raises(TrimtabError, match="finite number"):
            strength * adding()


@pytest.mark.parametrize("bad", [torch.full((8,), math.nan), torch.full((8,), math.inf)])
def test_a_direction_is_finite(bad: torch.Tensor) -> None:
    with pytest.raises(TrimtabError, match="8 values that are NaN or infinite"):
        Add(bad)


def test_a_direction_is_a_vector() -> None:
    with pytest.raises(TrimtabError, match=r"shape \[width\]"):
        Add(torch.zeros(2, 8))
    with pytest.raises(TrimtabError, match=r"torch.int64"):
        Add(torch.zeros(8, dtype=torch.long))
    with pytest.raises(TrimtabError, match="got list"):
        Add([1.0])  # type: ignore[arg-type]


def test_projections_need_unit_directions() -> None:
    with pytest.raises(TrimtabError, match="norm is 2"):
        SetProjection(2 * U, target=1)
    with pytest.raises(TrimtabError, match="norm is 2"):
        Ablate(2 * U)
    with pytest.raises(ValueError, match="target"):
        SetProjection(U, target=math.nan)
    with pytest.raises(ValueError, match="one_sided"):
        SetProjection(U, target=1, one_sided="up")  # type: ignore[arg-type]


def test_selecting() -> None:
    s = adding(1) + adding(3)
    assert s.only([3]) == adding(3)
    with pytest.raises(TrimtabError, match="nothing at layer 2; it has layers 1, 3"):
        s.only([2])
    assert {edit.positions for edit in s.at(Positions.all()).edits} == {Positions.all()}


def test_gates_combine() -> None:
    high = Threshold(Site(0), U, 1.0)
    facing = Threshold(Site(0), 5 * U, 0.9, measure="cosine")
    readings = {Reading(Site(0)): 3 * U + 4 * torch.eye(8)[1]}  # dot 3, cosine 0.6
    assert high.is_open(readings)
    assert not facing.is_open(readings)
    assert (high | facing).is_open(readings)
    assert not (high & facing).is_open(readings)
    assert (high & ~facing).is_open(readings)
    assert (high & ~facing).sites == {Site(0)}
    assert (Always() & high) == high
    assert adding().when(high).when(facing).edits[0].gate == high & facing
    assert Threshold(Site(0), U, 1.0) == high != Threshold(Site(0), U, 2.0)
    assert str(high & ~facing) == "(dot at residual[0] > 1) and (not (cosine at residual[0] > 0.9))"
    for bad in (math.nan, math.inf, "1", None):
        with pytest.raises(ValueError, match="threshold is"):
            Threshold(Site(0), U, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown measure"):
        Threshold(Site(0), U, 1.0, measure="angle")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Positions.all(), "0123456789"),
        (Positions.all_but_first(), "123456789"),
        (Positions.prompt(), "012345"),
        (Positions.generated(), "6789"),
        (Positions.from_last_prompt_token(), "56789"),
        (Positions.last_prompt_token(), "5"),
        (Positions.first_generated(2), "67"),
        (Positions.opening(1), "5"),
        (Positions.opening(3), "567"),
        (Positions.window(1, 3), "78"),
        (Positions.span(2, 4), "23"),
        (Positions.span(0, 1) | Positions.generated(), "06789"),
        (Positions.tokens([4, 0, 2]), "024"),
        (Positions.tokens([-6, 3, -1, 5]), "035"),
        (Positions.tokens([-2]) | Positions.generated(), "46789"),
    ],
    ids=str,
)
def test_positions(rule: Positions, expected: str) -> None:
    """Of a text of ten tokens whose prompt has six."""
    spans = rule.resolve(6)
    held = [t for t in range(10) if any(a <= t and (b is None or t < b) for a, b in spans)]
    assert "".join(map(str, held)) == expected
    assert Positions.from_json(rule.to_json()) == rule


def test_positions_from_words() -> None:
    end = (
        Positions.from_last_prompt_token(),
        Positions.last_prompt_token(),
        Positions.opening(1),
        Positions.opening(8),
    )
    tokens = (
        Positions.tokens([0]),
        Positions.tokens([2, 10, 44]),
        Positions.tokens([-3]),
        Positions.tokens([5, -1, -7]),
    )
    for rule in (Positions.all(), Positions.window(1, 3), Positions.span(2, 4), *end, *tokens):
        assert Positions.parse(str(rule)) == rule
    assert Positions.parse("first:3") == Positions.first_generated(3)
    for bad in (
        "everywhere",
        "span:1",
        "span:4:2",
        "window:a:b",
        "first:0",
        "opening:0",
        "opening:x",
        "tokens",
        "tokens:",
        "tokens:1,",
        "tokens:1:2",
        "tokens:a",
    ):
        with pytest.raises(TrimtabError, match=r"not known|got"):
            Positions.parse(bad)


def test_tokens_are_a_set_of_whole_numbers() -> None:
    assert Positions.tokens([10, 2, 2, -1]) == Positions.tokens((2, 10, -1))
    assert str(Positions.tokens([10, 2, -1, -5])) == "tokens:2,10,-5,-1"
    assert Positions.tokens([-1]) == Positions.last_prompt_token()
    assert Positions.tokens([3]) == Positions.span(3, 4)
    for bad in ([], [True], [1.5], ["1"]):
        with pytest.raises(ValueError, match="whole numbers, at least one"):
            Positions.tokens(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("index", [6, 44, -7])
def test_tokens_must_lie_in_the_prompt(index: int) -> None:
    for rule in (Positions.tokens([0, index]), Positions.tokens([index]) | Positions.generated()):
        with pytest.raises(TrimtabError, match=rf"token {index} .*is not in the prompt, which has 6 tokens"):
            rule.resolve(6)


def test_a_span_must_lie_in_the_prompt() -> None:
    with pytest.raises(TrimtabError, match="span 2:7 is not in the prompt, which has 6 tokens"):
        Positions.span(2, 7).resolve(6)


def test_sites() -> None:
    assert str(Site(3)) == "residual[3]"
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match="whole number"):
            Site(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown site kind"):
        Site(1, "somewhere")


def test_repr_is_readable() -> None:
    text = repr(0.5 * adding())
    assert "0.5 * add @ residual[1] from-last-prompt-token" in text
    assert "tensor" not in repr(adding().edits[0].operation)
    assert "5 more" in repr(sum([adding(i) for i in range(6)]))
