"""A model that is spread over two GPUs answers as it does on one device, however it is steered; on pretend ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pretend_gpu import pretending, spread
from tiny import LAYERS, WIDTH, direction, prompt, tiny
from torch import Tensor

from trimtab import Edit, Positions, Rejection, Site, Steering, Threshold
from trimtab.lm import LM
from trimtab.steering import (
    Add,
    BiasScores,
    MaskNeurons,
    ReadWrite,
    RotatePredicted,
    ScaleElements,
    ScaleScores,
    SetProjection,
    TargetMass,
    emphasis,
)
from trimtab.steering.rotations import weight_count

U, SPAN = direction(1), Positions.span(1, 3)
PROMPTS = [prompt(0, 7), prompt(1, 5)]


def random(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def at_all(operation: Any, kind: str = "residual", positions: Positions | None = None, **more: Any) -> Steering:
    where = positions or Positions.all()
    return Steering(tuple(Edit(Site(layer, kind), operation, where, **more) for layer in range(LAYERS)))


EMPHASIS = emphasis(ScaleScores(), ((2, 4),), range(LAYERS), "directer")
STEERINGS = {
    "emphasis": EMPHASIS,
    "bias": at_all(BiasScores(1.0), "scores", SPAN),
    "mass": at_all(TargetMass(0.5), "scores", SPAN),
    "add": at_all(Add(U)),
    "keep_norm": at_all(Add(U, keep_norm=True)),
    "set_projection": at_all(SetProjection(U, 1.0)),
    "rotate_predicted": at_all(RotatePredicted(U, random(weight_count(WIDTH)) - 0.5)),
    "read_write": at_all(ReadWrite(random(2, WIDTH), random(2, WIDTH) - 0.5)),
    "scale_elements": at_all(ScaleElements(U), "heads"),
    "mask_neurons": at_all(MaskNeurons(random(48)), "neurons", Positions.generated()),
    "gate": Steering((Edit(Site(1), Add(U), gate=Threshold(Site(3), U, -1e9)),)),
}
SCHEDULES = ("optimistic", "fused")
CASES = {
    **{name: (steering, None) for name, steering in STEERINGS.items()},
    **{f"emphasis, {one}": (EMPHASIS, Rejection(beta=0.05, schedule=one)) for one in SCHEDULES},
    **{
        f"{name}, rejected": (STEERINGS[name], Rejection(beta=0.05, schedule="optimistic"))
        for name in ("bias", "mass", "add", "rotate_predicted", "read_write")
    },
}


@pytest.fixture(scope="module")
def whole() -> LM:
    return tiny("llama")


@pytest.fixture(scope="module")
def halves() -> LM:
    lm = tiny("llama")
    second: list[Any] = [*lm.layout.blocks[LAYERS // 2 :], lm.layout.decoder.norm, lm.model.lm_head]
    spread(lm.model, [(block, 0) for block in lm.layout.blocks[: LAYERS // 2]] + [(part, 1) for part in second])
    return lm


@pytest.mark.filterwarnings("ignore::trimtab.lm.DoseWarning")
@pytest.mark.parametrize("name", CASES)
def test_the_same_answers(whole: LM, halves: LM, name: str) -> None:
    steering, rejection = CASES[name]
    wanted = whole.generate(PROMPTS, steering, max_new_tokens=7, rejection=rejection)
    assert [one.token_ids for one in wanted] != [one.token_ids for one in whole.generate(PROMPTS, max_new_tokens=7)]
    with pretending():
        found = halves.generate(PROMPTS, steering, max_new_tokens=7, rejection=rejection)
    for one, other in zip(found, wanted, strict=True):
        assert one.token_ids == other.token_ids
        assert one.applied == other.applied
        assert None in (one.trace, other.trace) or one.trace.steps == other.trace.steps  # type: ignore[union-attr]
