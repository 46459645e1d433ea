"""A steering whose numbers the model's dtype can't hold is refused before the first token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import LAYERS, WIDTH, direction, prompt, tiny

from trimtab import Add, Edit, Positions, SetProjection, Site, Steering, TrimtabError
from trimtab.engines.doses import DoseWarning
from trimtab.engines.folding import as_rows, kernel_call
from trimtab.engines.vllm.bank import Bank
from trimtab.engines.vllm.frontend import Link
from trimtab.engines.vllm.program import compile_program
from trimtab.engines.vllm.wire import Part, Wire, content_of, identified_edits

LARGE = torch.zeros(WIDTH).index_fill(0, torch.tensor([3]), -40_000.0)


def pushed(*strengths: float, where: Positions | None = None) -> Steering:
    edits = (Edit(Site(2), Add(LARGE), Positions.all() if where is None else where, s) for s in strengths)
    return Steering(tuple(edits))


WHY = r"at layer 2 the largest element, times the strength, is 8e\+04, and the model computes in float16, which holds"


@pytest.mark.parametrize("steering", [pushed(2.0), pushed(1.0, 1.0), pushed(-2.0, where=Positions.generated())])
def test_transformers(steering: Steering) -> None:
    """One edit as well as several that add up to too much."""
    lm = tiny("llama", dtype=torch.float16)
    with pytest.raises(TrimtabError, match=WHY + r" at most 6\.55e\+04; lower the strength, or load"):
        lm.generate(prompt(0, 5), steering, max_new_tokens=2)
    with pytest.raises(TrimtabError, match=WHY), lm.steered(steering):
        lm.model(torch.tensor([lm.encode(prompt(0, 5))]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_hold_it(dtype: torch.dtype) -> None:
    lm = tiny("llama", dtype=dtype)
    with pytest.warns(DoseWarning):
        assert lm.generate(prompt(0, 5), pushed(2.0), max_new_tokens=2)[0].token_ids


def test_what_just_fits_is_taken() -> None:
    """65,519 is rounded to the largest number of float16, 65,520 to infinity; and what is infinite on purpose stays."""
    edits = tuple(Edit(Site(2), Add(LARGE), Positions.all(), 65_519 / 40_000) for _ in range(1))
    assert as_rows(kernel_call(edits)[1], torch.float16, edits)["vector"].min() == -65_504
    more = (Edit(Site(2), Add(LARGE), Positions.all(), 65_520 / 40_000),)
    with pytest.raises(TrimtabError, match="layer 2"):
        as_rows(kernel_call(more)[1], torch.float16, more)
    clamp = (Edit(Site(1), SetProjection(direction(1).float() / direction(1).norm().float(), 1.0), Positions.all()),)
    assert as_rows(kernel_call(clamp)[1], torch.float32, clamp)
    assert as_rows({"low": torch.tensor([-torch.inf])}, torch.float16, clamp)["low"].isinf().all()


def test_vllm_refuses_the_request_and_its_bank_the_row() -> None:
    """The front end does, so that the workers live on; the bank is where it would go wrong."""
    steering = pushed(1.0, 1.0)
    digest, content, strengths = content_of(steering)
    part = Part(digest, strengths)

    def link(dtype: torch.dtype) -> Any:
        made = Link(8, LAYERS, WIDTH, False, dtype=dtype)
        made.sent[digest] = content
        return made

    assert link(torch.bfloat16).wire_for_prompt(Wire((part,)), 4).slots
    with pytest.raises(TrimtabError, match=WHY):
        link(torch.float16).wire_for_prompt(Wire((part,)), 4)
    (segment,) = compile_program(identified_edits(part, content), 4)
    bank = Bank(range(LAYERS), WIDTH, 4, 16, torch.float16, torch.device("cpu"))
    with pytest.raises(TrimtabError, match=WHY):
        bank.acquire(segment.state)
