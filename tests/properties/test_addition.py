"""What must hold of a vector that is added (CAA, ActAdd), on tiny random models of many families."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny
import torch
from tiny import FAMILIES, direction, prompt
from torch import Tensor

from trimtab import LM, Add, Edit, Positions, Site, Steering

LAYER = 1
TEXT = prompt(1, 9)
PROMPT = 6
"""How many of the text's tokens are the prompt; the rest stands for an answer."""


@pytest.fixture(scope="module", params=list(FAMILIES))
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


def adding(positions: Positions, layer: int = LAYER, scale: float = 2.0) -> Steering:
    return Steering((Edit(Site(layer), Add(direction(1, scale)), positions),))


@torch.no_grad()
def forward(lm: LM, steering: Steering | None, ids: Sequence[int] | None = None) -> tuple[Tensor, list[Tensor]]:
    """The logits `[tokens, vocabulary]` of a whole text, and each block's output `[tokens, width]`."""
    ids = lm.encode(TEXT) if ids is None else ids
    activations: list[Tensor] = []
    # Steering first: hooks run in their order, and these are to see what it made of the block's output.
    with lm.steered(steering or Steering(), prompt_lengths=[PROMPT]):
        handles = [
            block.register_forward_hook(lambda _m, _a, o: activations.append((o if isinstance(o, Tensor) else o[0])[0]))
            for block in lm.layout.blocks
        ]
        try:
            logits = lm.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
    return logits, activations


def test_nowhere_and_strength_zero_are_nothing_to_the_bit(lm: LM) -> None:
    nowhere = [Positions(()), Positions.window(50, 60)]
    nothing = [*map(adding, nowhere), 0.0 * adding(Positions.all())]
    plain, _ = forward(lm, None)
    for steering in nothing:
        logits, _ = forward(lm, steering)
        assert torch.equal(logits, plain)
    assert not torch.equal(forward(lm, adding(Positions.all()))[0], plain)


def test_the_site_moves_by_the_vector_and_by_nothing_else(lm: LM) -> None:
    _, before = forward(lm, None)
    for strength in (-2.0, 0.5, 1.0):
        _, after = forward(lm, strength * adding(Positions.from_last_prompt_token()))
        for layer in range(LAYER):
            assert torch.equal(after[layer], before[layer])
        moved = after[LAYER] - before[LAYER]
        assert not moved[: PROMPT - 1].any()
        expected = (strength * direction(1, 2.0)).to(moved.dtype).expand_as(moved[PROMPT - 1 :])
        # float32: the difference of sums is as exact as their last bits
        assert torch.allclose(moved[PROMPT - 1 :], expected, atol=2e-5)


def test_the_first_position_is_the_last_prompt_token(lm: LM) -> None:
    """One token later, and exactly one position of the site differs."""
    _, early = forward(lm, adding(Positions.from_last_prompt_token()))
    _, late = forward(lm, adding(Positions.generated()))
    differs = (early[LAYER] != late[LAYER]).any(-1)
    assert differs.nonzero().flatten().tolist() == [PROMPT - 1]


def test_what_comes_before_is_not_touched(lm: LM) -> None:
    """Logits before the first steered position are the unsteered ones; from there on they are not."""
    plain, _ = forward(lm, None)
    logits, _ = forward(lm, adding(Positions.from_last_prompt_token()))
    assert torch.allclose(logits[: PROMPT - 1], plain[: PROMPT - 1], atol=1e-5)
    assert float((logits[PROMPT - 1 :] - plain[PROMPT - 1 :]).abs().amax(-1).min()) > 1e-3


def test_a_block_later_and_before_it_is_the_same(lm: LM) -> None:
    """The output of a block is the input of the next: papers that add before block l are at site l - 1 here."""
    push = direction(1, 2.0)

    def add_before(_module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> object:
        if args:
            return (args[0] + push.to(args[0].dtype), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + push.to(kwargs["hidden_states"].dtype)}

    handle = lm.layout.blocks[LAYER + 1].register_forward_pre_hook(add_before, with_kwargs=True)
    try:
        by_hand, _ = forward(lm, None)
    finally:
        handle.remove()
    ours, _ = forward(lm, adding(Positions.all()))
    wrong, _ = forward(lm, adding(Positions.all(), layer=LAYER + 1))
    assert torch.allclose(ours, by_hand, atol=1e-4)
    assert not torch.allclose(wrong, by_hand, atol=1e-2)


# ---- ActAdd (Turner et al., 2308.10248): one pair of prompts, added position by position at the front -----------


def act_add(lm: LM, positive: str, negative: str) -> Steering:
    """The difference of two prompts' activations, row t of it at token t."""
    pair = lm.capture([positive, negative], [LAYER], Positions.all())
    rows = pair[0][Site(LAYER)].double() - pair[1][Site(LAYER)].double()
    edits = [Edit(Site(LAYER), Add(row), Positions.span(t, t + 1)) for t, row in enumerate(rows)]
    return Steering(tuple(edits))


def test_act_add(lm: LM) -> None:
    """What both prompts begin with gives no row, equal prompts do nothing, and generated tokens are left alone."""
    opening = prompt(5, 1)
    steering = act_add(lm, f"{opening} {prompt(6, 3)}", f"{opening} {prompt(7, 3)}")
    rows = [edit.operation.direction for edit in steering.edits]
    assert float(rows[0].norm()) < 1e-4
    assert all(float(row.norm()) > 0.1 for row in rows[1:])
    _, before = forward(lm, None)
    _, after = forward(lm, steering)
    moved = after[LAYER] - before[LAYER]
    assert not moved[len(rows) :].any()
    assert torch.allclose(moved[: len(rows)], torch.stack(rows).to(moved.dtype), atol=2e-5)
    plain, _ = forward(lm, None)
    same, _ = forward(lm, act_add(lm, prompt(6, 4), prompt(6, 4)))
    assert torch.allclose(same, plain, atol=1e-6)
