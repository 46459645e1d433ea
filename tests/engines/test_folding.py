"""Edits folded into rows: what all tokens share is one row, and vectors are compiled once."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import direction, prompt

from trimtab import Add, Edit, ScaleElements, Site, Steering
from trimtab.engines.folding import States, apply, compiled, slots_at, stages_of
from trimtab.steering.operations import Operation

SITE = Site(1)


def edit(operation: Operation, strength: float = 1.0) -> Edit:
    return Edit(SITE, operation, strength=strength)


@pytest.mark.parametrize(
    "operation", [Add(direction(1)), ScaleElements(direction(2).exp()), Add(direction(3), keep_norm=1.0)]
)
@pytest.mark.parametrize("numbers", [[[1, 1, 1], [1, 1, 1]], [[0, 0, 0], [0, 0, 0]], [[2, 1, 1], [1, 0, 2]], [[], []]])
def test_each_token_gets_the_row_of_its_state(operation: Operation, numbers: list[list[int]]) -> None:
    slots = {state: slots_at((edit(operation, strength),), SITE) for state, strength in ((1, 0.5), (2, -1.5))}
    (stage,) = stages_of(slots, torch.float32)
    at = torch.tensor(numbers, dtype=torch.long)
    x = torch.randn(*at.shape, len(direction(1)), generator=torch.Generator().manual_seed(4))
    together = apply(stage, *stage.prepare(States.of(at, x.device), x.dtype), x)
    for row, states in enumerate(numbers):
        for token, state in enumerate(states):
            here = States.of(torch.tensor([[state]]), x.device)
            each = stage.gather(here), None if stage.in_place else stage.active[here.index]
            assert torch.equal(together[row, token], apply(stage, *each, x[row, token][None, None])[0, 0])
            assert (state == 0) == torch.equal(together[row, token], x[row, token])


def test_equal_vectors_are_compiled_once_and_others_are_not_taken_for_them() -> None:
    first = compiled((edit(Add(direction(1)), 2.0),), torch.float32)[2]["vector"]
    assert compiled((edit(Add(direction(1).clone()), 2.0),), torch.float32)[2]["vector"] is first
    assert torch.equal(first, 2 * direction(1).float())
    others = (edit(Add(direction(1)), 3.0),), (edit(Add(direction(2)), 2.0),)
    assert all(not torch.equal(compiled(slot, torch.float32)[2]["vector"], first) for slot in others)
    assert compiled((edit(Add(direction(1)), 2.0),), torch.bfloat16)[2]["vector"].dtype == torch.bfloat16


def test_what_was_compiled_without_gradients_may_be_used_with_them() -> None:
    """An answer in inference mode comes first, and then somebody learns under the same steering."""
    lm = tiny.tiny("llama")
    steering = Steering((edit(ScaleElements(direction(5).exp()), 0.25),))
    with torch.inference_mode():
        lm.generate(prompt(1, 6), steering, max_new_tokens=2)
    embedded = lm.model.get_input_embeddings()(torch.tensor([lm.encode(prompt(1, 6))])).detach().requires_grad_()
    with lm.steered(steering):
        lm.model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.isfinite().all()
