"""What steering costs a GPU, counted on a pretend one: kernels, waits and copies, over those of the unsteered model.

The numbers are exact and don't depend on the machine. A ceiling is what is true today: lower it where that gets less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from pretend_gpu import Counts, move, pretending
from tiny import SIZES, WIDTH, direction, prompt, tokenizer
from torch import Tensor

from trimtab import Edit, Positions, Rejection, Site, Steering, Threshold
from trimtab.lm import LM
from trimtab.steering import (
    Ablate,
    Add,
    MaskNeurons,
    ReadWrite,
    Rotate,
    RotateInPlane,
    RotatePredicted,
    ScaleElements,
    ScaleScores,
    SetProjection,
    emphasis,
)
from trimtab.steering.rotations import weight_count

LAYERS = 4
TOKENS = 8
"""The last tokens of an answer, over which is counted: doses are measured at one in so many."""
NEW = 10
DOSES = 15
"""Launches to sum doses up, once in `TOKENS`, at however many layers."""
U, V = direction(1).float(), direction(2).float()
PROMPTS = [prompt(0, 7), prompt(1, 5)]


@dataclass(frozen=True)
class Cost:
    """What a token costs, in eighths: what `TOKENS` of them do."""

    launches: int
    waits: int
    copies: int

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.launches - other.launches, self.waits - other.waits, self.copies - other.copies)


@dataclass(frozen=True)
class Device:
    """A model of `LAYERS` blocks on the pretend GPU, what has been counted there, and what it costs unsteered."""

    lm: LM
    counts: Counts
    unsteered: Cost

    def extra(self, steering: Any, **options: Any) -> Cost:
        return cost(self.lm, self.counts, steering, **options) - self.unsteered


def llama(dtype: torch.dtype = torch.float32) -> LM:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": LAYERS}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    model.generation_config.eos_token_id = None
    return LM(model.eval().to(dtype), tokenizer(), name="tiny-llama")


def cost(lm: LM, counts: Counts, steering: Any, prompts: Sequence[str] = PROMPTS, **options: Any) -> Cost:
    """What the last `TOKENS` tokens of these answers cost."""
    marks: list[tuple[int, int, int]] = []

    def mark(ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        marks.append(counts.totals)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    lm.generate(prompts, steering, max_new_tokens=NEW, stopping_criteria=[mark], **options)
    each = len(marks) // NEW  # with rejection each row is asked for
    return Cost(*marks[-1]) - Cost(*marks[-1 - each * TOKENS])


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    lm = llama()
    move(lm.model)
    with pretending() as counts:
        yield Device(lm, counts, cost(lm, counts, None))


def at_all(operation: Any, kind: str = "residual", positions: Positions | None = None, **more: Any) -> Steering:
    where = positions or Positions.all()
    return Steering(tuple(Edit(Site(layer, kind), operation, where, **more) for layer in range(LAYERS)))


def random(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


def when(threshold: float) -> Threshold:
    return Threshold(Site(2), U, threshold)


def each_token() -> Steering:
    edits = [
        Edit(Site(i), Add(U), Positions.all(), gate=Threshold(Site(i), U, 0.0, each_token=True)) for i in range(LAYERS)
    ]
    return Steering(tuple(edits))


GENERATED = Positions.generated()
OPERATIONS: dict[str, tuple[Steering, float]] = {
    "add": (at_all(Add(U)), 1.2),
    "add, generated": (at_all(Add(U), positions=GENERATED), 1.2),
    "add, gate open": (at_all(Add(U), gate=when(-1e9)), 1.2),
    "add, gate shut": (at_all(Add(U), gate=when(1e9)), 0),
    "add, gate at each token": (each_token(), 6.4),
    "add, keep_norm": (at_all(Add(U, keep_norm=True)), 4.4),
    "set_projection": (at_all(SetProjection(U, 1.0)), 2.4),
    "set_projection, one-sided": (at_all(SetProjection(U, 1.0, one_sided=True)), 3.4),
    "set_projection, keep_norm": (at_all(SetProjection(U, 1.0, keep_norm=True)), 5.4),
    "ablate": (at_all(Ablate(U)), 2.4),
    "rotate": (at_all(Rotate(U)), 3.4),
    "rotate by an angle": (at_all(Rotate(U, 0.3)), 10.4),
    "rotate_predicted": (at_all(RotatePredicted(U, random(weight_count(WIDTH)) - 0.5)), 20.4),
    "rotate_in_plane": (at_all(RotateInPlane(U, V, 0.3)), 4.4),
    "scale_elements": (at_all(ScaleElements(U), "heads"), 1.4),
    "mask_neurons": (at_all(MaskNeurons(random(48)), "neurons", GENERATED), 1.4),
    "read_write": (at_all(ReadWrite(random(2, WIDTH), random(2, WIDTH) - 0.5)), 4.4),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_launches_a_layer(device: Device, name: str) -> None:
    """A token's, doses included; there are no further waits and copies."""
    steering, ceiling = OPERATIONS[name]
    extra = device.extra(steering)
    a_layer = max(0, extra.launches - DOSES) / LAYERS / TOKENS
    assert a_layer <= ceiling, f"{extra.launches} launches"
    assert a_layer > ceiling - 0.25, "it has become cheaper: lower the ceiling"
    assert (extra.waits, extra.copies) == (0, 0)


IN_BFLOAT16 = {"add": 1.2, "add, keep_norm": 6.4, "set_projection": 4.4, "rotate": 5.4, "mixed": 5.4}
"""What is computed in float32 is converted there and back."""


@pytest.fixture(scope="module")
def half(device: Device) -> Device:
    lm = llama(torch.bfloat16)
    move(lm.model)
    return Device(lm, device.counts, cost(lm, device.counts, None))


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_launches_a_layer_in_bfloat16(half: Device, name: str) -> None:
    steering = at_all(SetProjection(U, 1.0)) if name == "mixed" else OPERATIONS[name][0]
    steerings = [steering, None] if name == "mixed" else steering  # one row is steered, and one isn't
    extra = half.extra(steerings)
    a_layer = max(0, extra.launches - DOSES) / LAYERS / TOKENS
    assert IN_BFLOAT16[name] - 0.25 < a_layer <= IN_BFLOAT16[name], f"{a_layer} launches"
    assert (extra.waits, extra.copies) == (0, 0)


SCHEDULES = ("optimistic", "fused")
REJECTED = {
    "emphasis": emphasis(ScaleScores(), ((2, 4),), range(LAYERS), "directer"),
    "add": at_all(Add(U), positions=GENERATED),
}


@pytest.fixture(scope="module")
def with_rejection(device: Device) -> Callable[..., Cost]:
    """What a token costs; each case is counted once, for all tests that ask for it."""

    @cache
    def count(name: str, schedule: str, beta: float, times: int = 1) -> Cost:
        way = Rejection(beta=beta, schedule=schedule)
        return cost(device.lm, device.counts, REJECTED[name], times * PROMPTS, rejection=way)

    return count


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", REJECTED)
def test_rejection_with_a_shut_gate_waits_once_a_token(
    with_rejection: Callable[..., Cost], name: str, schedule: str
) -> None:
    """And copies nothing: what passes of rows need is there from the first of them on."""
    whole = with_rejection(name, schedule, 1.0)
    assert (whole.waits, whole.copies) == (TOKENS, 0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", REJECTED)
def test_rejection_with_an_open_gate_waits_twice_a_token(
    with_rejection: Callable[..., Cost], name: str, schedule: str
) -> None:
    """Every first rung is plausible here. Drafts are copied: their ids, and which of them came true. Rungs that share
    the step's pass are told with it."""
    whole = with_rejection(name, schedule, 1e-30)
    drafts = schedule == "optimistic"
    assert whole.waits == (2 * TOKENS if drafts else TOKENS)
    assert whole.copies <= (3 * TOKENS if drafts else 0)


@pytest.mark.parametrize("beta", [1.0, 1e-30])
@pytest.mark.parametrize("name", REJECTED)
def test_rows_attend_in_one_product_however_many_requests_there_are(
    with_rejection: Callable[..., Cost], name: str, beta: float
) -> None:
    """In each layer, where all have equally many rows: kernels are the same for two and for four."""
    two, four = (with_rejection(name, "fused", beta, times) for times in (1, 2))
    assert four.launches - two.launches <= 10 * TOKENS, "what is decided a request"
