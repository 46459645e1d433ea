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
    Ablate,
    Add,
    AddScaled,
    BiasScores,
    HoldElements,
    MaskNeurons,
    ReadWrite,
    Rotate,
    RotateInPlane,
    RotatePredicted,
    ScaleElements,
    ScaleKeys,
    ScaleScores,
    SetProjection,
    TargetMass,
    emphasis,
)
from trimtab.steering.operations import OPERATIONS
from trimtab.steering.rotations import weight_count
from trimtab.steering.routing import RouteExperts
from trimtab.steering.site import KINDS

U, SPAN = direction(1), Positions.span(1, 3)
PROMPTS = [prompt(0, 7), prompt(1, 5)]
NEW = 5


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
    "scale_keys": at_all(ScaleKeys(8.0), "keys", SPAN),
    "add": at_all(Add(U)),
    "keep_norm": at_all(Add(U, keep_norm=True)),
    "set_projection": at_all(SetProjection(U, 1.0)),
    "set_projection, one-sided": at_all(SetProjection(U, 1.0, one_sided=True)),
    "ablate": at_all(Ablate(U)),
    "rotate": at_all(Rotate(U)),
    "rotate half": 0.5 * at_all(Rotate(U)),
    "rotate by an angle": at_all(Rotate(U, 0.6)),
    "rotate in a plane": at_all(RotateInPlane(U, direction(2), 0.7)),
    "rotate to a place in a plane": at_all(RotateInPlane(U, direction(2))),
    "add_scaled": at_all(AddScaled(U, by="sign")),
    "block_input": at_all(Add(U), "block_input"),
    "attention": at_all(Add(U), "attention"),
    "mlp": at_all(Add(U), "mlp"),
    "rotate_predicted": at_all(RotatePredicted(U, random(weight_count(WIDTH)) - 0.5)),
    "read_write": at_all(ReadWrite(random(2, WIDTH), random(2, WIDTH) - 0.5)),
    "read_write, bounded": at_all(ReadWrite(random(2, WIDTH), random(2, WIDTH) - 0.5, low=0.0, keep_norm=0.5)),
    "scale_elements": at_all(ScaleElements(U), "heads"),
    "hold_elements": at_all(HoldElements(random(48)), "neurons", Positions.generated()),
    "mask_neurons": at_all(MaskNeurons(random(48)), "neurons", Positions.generated()),
    "act_fn": at_all(ScaleElements(random(48)), "act_fn"),
    "gate": Steering((Edit(Site(1), Add(U), gate=Threshold(Site(3), U, -1e9)),)),
    "gate at each token": Steering(
        tuple(Edit(Site(i), Add(U), gate=Threshold(Site(i), U, 0.0, each_token=True)) for i in range(LAYERS))
    ),
}
SCHEDULES = ("optimistic", "fused")
CASES = {
    **{name: (steering, None) for name, steering in STEERINGS.items()},
    **{f"emphasis, {schedule}": (EMPHASIS, Rejection(beta=0.05, schedule=schedule)) for schedule in SCHEDULES},
    **{
        f"{name}, rejected": (STEERINGS[name], Rejection(beta=0.05, schedule="optimistic"))
        for name in ("bias", "mass", "add", "rotate_predicted", "rotate by an angle", "read_write", "keep_norm")
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


@pytest.fixture(scope="module")
def unsteered(whole: LM) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in whole.generate(PROMPTS, max_new_tokens=NEW)]


@pytest.mark.filterwarnings("ignore::trimtab.lm.DoseWarning")
@pytest.mark.parametrize("name", CASES)
def test_the_same_answers(whole: LM, halves: LM, unsteered: list[tuple[int, ...]], name: str) -> None:
    steering, rejection = CASES[name]
    wanted = whole.generate(PROMPTS, steering, max_new_tokens=NEW, rejection=rejection)
    assert [expected.token_ids for expected in wanted] != unsteered
    with pretending():
        answers = halves.generate(PROMPTS, steering, max_new_tokens=NEW, rejection=rejection)
    for answer, other in zip(answers, wanted, strict=True):
        assert answer.token_ids == other.token_ids
        assert answer.applied == other.applied
        assert None in (answer.trace, other.trace) or answer.trace.steps == other.trace.steps  # type: ignore[union-attr]


def test_every_operation_is_among_them() -> None:
    edits = [edit for steering in STEERINGS.values() for edit in steering.edits]
    assert {type(edit.operation) for edit in edits} >= set(OPERATIONS.values()) - {RouteExperts}
    assert {edit.site.kind for edit in edits} == set(KINDS) - {"router"}  # of mixtures, which this is none of


@pytest.mark.filterwarnings("ignore::trimtab.lm.DoseWarning")
def test_rows_of_every_kind_in_one_batch(whole: LM, halves: LM) -> None:
    """They join while others are being answered, and leave one by one."""
    steerings: list[Steering | None] = [None, *STEERINGS.values()]
    prompts = [prompt(n, 4 + n % 4) for n in range(len(steerings))]
    options: dict[str, Any] = {"max_new_tokens": 5, "batch_size": 8}
    wanted = whole.generate(prompts, steerings, **options)
    with pretending():
        answers = halves.generate(prompts, steerings, **options)
    assert [generated.token_ids for generated in answers] == [expected.token_ids for expected in wanted]
    for answer, other in zip(answers, wanted, strict=True):
        assert [(dose.layer, dose.tokens) for dose in answer.applied.doses] == [
            (dose.layer, dose.tokens) for dose in other.applied.doses
        ]
        assert [dose.ratio for dose in answer.applied.doses] == pytest.approx([d.ratio for d in other.applied.doses])
