"""One layer of a steering, its direction, and how alike two steerings are."""

from __future__ import annotations

import pytest
import torch

from trimtab import Ablate, Add, BiasScores, Card, Edit, Site, Steering, TrimtabError
from trimtab.steering.directions import directions

X, Y, Z = torch.eye(3)


def adds(vectors: dict[int, torch.Tensor], strength: float = 1.0) -> Steering:
    return Steering(tuple(Edit(Site(i), Add(v), strength=strength) for i, v in vectors.items()), Card("caa"))


def test_one_layer() -> None:
    both = adds({2: X, 5: Y})
    assert both[5] == adds({5: Y})
    assert both[5].card == both.card
    with pytest.raises(TrimtabError, match="nothing at layer 3; it has layers 2, 5"):
        both[3]
    for no_layer in (slice(2, 5), "5", True, [2, 5]):
        with pytest.raises(TrimtabError, match=r"the edits at layer 14.*steering\.only"):
            both[no_layer]  # type: ignore[index]


def test_a_steering_is_no_list_of_layers() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        list(adds({0: X}))  # type: ignore[call-overload]


def test_the_direction_is_a_unit_vector_that_points_where_it_steers() -> None:
    assert torch.equal(adds({4: 3 * X})[4].direction(4), X)
    assert torch.equal(adds({4: 3 * X}, -2.0).direction(4), -X)
    assert torch.equal(Steering((Edit(Site(4), Ablate(Y), strength=-1.0),)).direction(4), Y)
    with pytest.raises(TrimtabError, match="nothing at layer 5"):
        adds({4: X}).direction(5)
    with pytest.raises(TrimtabError, match="several edits"):
        (adds({4: X}) + adds({4: Y})).direction(4)


def test_the_cosine_layer_by_layer() -> None:
    first, second = adds({1: X, 2: X + Y, 4: Z}), adds({2: 5 * X, 4: -Z, 6: Y})
    assert first.cosine(second) == pytest.approx({2: 0.5**0.5, 4: -1.0})
    assert first.cosine(-1 * first) == pytest.approx(dict.fromkeys((1, 2, 4), -1.0))


def test_what_two_steerings_do_not_share_is_named() -> None:
    first = adds({1: X, 2: Y})
    with pytest.raises(TrimtabError, match="share no layer: one acts at 1, 2, the other at 3;"):
        first.cosine(adds({3: X}))
    with pytest.raises(TrimtabError, match="at layer 2 these steerings have different widths, 3 and 4"):
        first.cosine(adds({2: torch.ones(4)}))
    with pytest.raises(TrimtabError, match=r"share no site: one acts at residual\[2\], the other at mlp\[2\]"):
        first.cosine(Steering((Edit(Site(2, "mlp"), Add(X)),)))
    with pytest.raises(TrimtabError, match="with another steering, got Tensor"):
        first.cosine(X)  # type: ignore[arg-type]


def test_attention_has_no_direction() -> None:
    towards = Steering((Edit(Site(1, "scores"), BiasScores(1.0)),))
    with pytest.raises(TrimtabError, match="no direction"):
        directions(towards)
