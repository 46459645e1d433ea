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
from trimtab.engines.transformers.decode import GenerationBatch, GenerationRequest
from trimtab.lm import LM
from trimtab.steering import (
    Ablate,
    Add,
    AddScaled,
    HoldElements,
    MaskNeurons,
    ReadWrite,
    Rotate,
    RotateInPlane,
    RotatePredicted,
    RouteExperts,
    ScaleElements,
    ScaleKeys,
    ScaleScores,
    SetProjection,
    emphasis,
    operations,
)
from trimtab.steering.rotations import weight_count

LAYERS = 4
TOKENS = 8
"""The last tokens of an answer, over which is counted: doses are measured at one in so many."""
NEW = 10
DOSES = {"generate": 15, "steps": 11}
"""Launches to sum doses up, once in `TOKENS`, at however many layers, in transformers' own loop and in our own."""
DTYPES = (torch.float32, torch.bfloat16)
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
    unsteered: dict[str, Cost]

    @classmethod
    def of(cls, lm: LM, counts: Counts) -> Device:
        move(lm.model)
        steps = step_cost(lm, counts, [None, None])
        return cls(lm, counts, {"generate": cost(lm, counts, None), "steps": steps})

    def extra(self, loop: str, steerings: Sequence[Steering | None]) -> Cost:
        """What rows with these steerings cost more than unsteered ones, in this loop."""
        count = cost if loop == "generate" else step_cost
        return count(self.lm, self.counts, steerings) - self.unsteered[loop]


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


def step_cost(lm: LM, counts: Counts, steerings: Sequence[Steering | None]) -> Cost:
    """What the last `TOKENS` steps of a running batch cost, whose rows have these steerings."""
    batch = GenerationBatch(lm.model, lm.tokenizer, lm.layout)
    for text, steering in zip(PROMPTS, steerings, strict=True):
        batch.insert(GenerationRequest(tuple(lm.encode(text)), steering, 4 * NEW))
    for _ in range(NEW - TOKENS):
        batch.step()
    before = counts.totals
    for _ in range(TOKENS):
        batch.step()
    return Cost(*counts.totals) - Cost(*before)


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with pretending() as counts:
        yield Device.of(llama(), counts)


@pytest.fixture(scope="module")
def devices(device: Device) -> dict[torch.dtype, Device]:
    return {torch.float32: device, torch.bfloat16: Device.of(llama(torch.bfloat16), device.counts)}


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
OPERATIONS: dict[str, tuple[Steering, float, float]] = {
    "add": (at_all(Add(U)), 1.2, 1.2),
    "add, generated": (at_all(Add(U), positions=GENERATED), 1.2, 1.2),
    "add, gate open": (at_all(Add(U), gate=when(-1e9)), 1.2, 1.2),
    "add, gate shut": (at_all(Add(U), gate=when(1e9)), 0, 0),
    "add, gate at each token": (each_token(), 6.4, 7.4),
    "add, keep_norm": (at_all(Add(U, keep_norm=True)), 4.4, 6.4),
    "set_projection": (at_all(SetProjection(U, 1.0)), 2.4, 4.4),
    "set_projection, one-sided": (at_all(SetProjection(U, 1.0, one_sided=True)), 3.4, 5.4),
    "set_projection, keep_norm": (at_all(SetProjection(U, 1.0, keep_norm=True)), 5.4, 7.4),
    "ablate": (at_all(Ablate(U)), 2.4, 4.4),
    "rotate": (at_all(Rotate(U)), 3.4, 5.4),
    "rotate by an angle": (at_all(Rotate(U, 0.3)), 10.4, 12.4),
    "rotate_predicted": (at_all(RotatePredicted(U, random(weight_count(WIDTH)) - 0.5)), 20.4, 22.4),
    "rotate_in_plane": (at_all(RotateInPlane(U, V, 0.3)), 4.4, 6.4),
    "scale_elements": (at_all(ScaleElements(U), "heads"), 1.4, 1.4),
    "mask_neurons": (at_all(MaskNeurons(random(48)), "neurons", GENERATED), 1.4, 1.4),
    "read_write": (at_all(ReadWrite(random(2, WIDTH), random(2, WIDTH) - 0.5)), 4.4, 5.4),
    "add_scaled": (at_all(AddScaled(U, by="sign")), 5.4, 6.4),
    "hold_elements": (at_all(HoldElements(random(48)), "neurons", GENERATED), 1.4, 2.4),
    "scale_keys": (at_all(ScaleKeys(1.5), "keys"), 1.4, 1.4),
}


"""Each with its launches a layer and token in float32, and in bfloat16, where most is computed in float32 and converted
there and back."""


def check_launches(device: Device, loop: str, steerings: Sequence[Steering | None], ceiling: float) -> None:
    """A token's launches a layer, doses included; there are no further waits and copies."""
    extra = device.extra(loop, steerings)
    a_layer = max(0, extra.launches - DOSES[loop]) / LAYERS / TOKENS
    assert a_layer <= ceiling, f"{extra.launches} launches"
    assert a_layer > ceiling - 0.25, "it has become cheaper: lower the ceiling"
    assert (extra.waits, extra.copies) == (0, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loop", DOSES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_launches_a_layer(devices: dict[torch.dtype, Device], name: str, loop: str, dtype: torch.dtype) -> None:
    steering, *ceilings = OPERATIONS[name]
    check_launches(devices[dtype], loop, [steering, steering], ceilings[DTYPES.index(dtype)])


def test_every_operation_has_a_ceiling() -> None:
    edits = [edit for steering, *_ in OPERATIONS.values() for edit in steering.edits]
    assert {type(edit.operation) for edit in edits} >= set(operations.OPERATIONS.values()) - {RouteExperts}


def other_map() -> Steering:
    return at_all(ReadWrite(random(2, WIDTH) - 0.5, random(2, WIDTH)))


MIXED: dict[str, tuple[Steering, Steering | None, float, float]] = {
    "add, ablate": (OPERATIONS["add"][0], OPERATIONS["ablate"][0], 4.4, 6.4),
    "set_projection, unsteered": (OPERATIONS["set_projection"][0], None, 3.4, 5.4),
    "read_write, unsteered": (OPERATIONS["read_write"][0], None, 8.4, 10.4),
    "read_write, another map": (OPERATIONS["read_write"][0], other_map(), 9.4, 10.4),
    "read_write, rotate": (OPERATIONS["read_write"][0], OPERATIONS["rotate"][0], 12.4, 16.4),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_launches_a_layer_of_a_batch_that_mixes(
    devices: dict[torch.dtype, Device], name: str, dtype: torch.dtype
) -> None:
    steering, other, *ceilings = MIXED[name]
    check_launches(devices[dtype], "steps", [steering, other], ceilings[DTYPES.index(dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_waits_once(devices: dict[torch.dtype, Device], dtype: torch.dtype) -> None:
    unsteered = devices[dtype].unsteered["steps"]
    assert (unsteered.waits, unsteered.copies) == (TOKENS, 0)


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
