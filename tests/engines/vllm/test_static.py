"""The operators of captured graphs in an engine on a CPU: none is captured there, but every pass runs them.

Passes of more than 40 tokens run in Python, as on a GPU those that are larger than what is captured.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import LONG, PROMPTS, TINY, added, direction

from trimtab import (
    LM,
    Ablate,
    Add,
    Edit,
    Positions,
    ScaleElements,
    ScaleScores,
    SetProjection,
    Site,
    Steering,
    Threshold,
    by_keys,
)
from trimtab.errors import UnsupportedError
from trimtab.steering import AddScaled, ReadWrite, RotateInPlane, emphasis
from trimtab.steering.rotations import Rotate

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TRIMTAB_STATIC": "40",
    "TRIMTAB_KERNEL": "all",
    "TRIMTAB_STEPS": "2",
    "TRIMTAB_SLOTS": "9",
    "TRIMTAB_MAPS": "7",
    "TRIMTAB_SITES": "heads,neurons,attention,mlp,keys",
}
NEW = 8


def read_write(seed: int, rank: int) -> ReadWrite:
    read = torch.stack([direction(seed + i) for i in range(rank)])
    write = torch.stack([direction(seed + 50 + i, 0.8) for i in range(rank)])
    return ReadWrite(read, write, 0.5, low=0.0)


SHUT = Threshold(Site(10), direction(61), 1e6, each_token=True)
OPERATIONS: dict[str, tuple[Any, Any]] = {
    "projection": (SetProjection(direction(2), target=40.0), None),
    "one-sided": (SetProjection(direction(2), target=4.0, one_sided=True), None),
    "ablation": (Ablate(direction(3)), None),
    "kept norm": (Add(direction(4, 8.0), keep_norm=True), None),
    "scale": (ScaleElements((direction(5) > 0.02).float()), None),
    "plane": (RotateInPlane(direction(6), direction(7), angle=0.8), None),
    "map": (read_write(100, 4), None),
    "in norms": (0.1, None),
    "gated": (Ablate(direction(3)), Threshold(Site(10), direction(60), 0.0, each_token=True)),
    "by cosine": (Add(direction(8, 9.0)), Threshold(Site(10), direction(62), 0.01, "cosine", each_token=True)),
}


def steering(name: str, where: Positions) -> Steering:
    operation, gate = OPERATIONS[name]
    strength = 1.0
    if isinstance(operation, float):
        operation, strength = AddScaled(direction(9), by="norm"), operation
    made = Steering((Edit(Site(10), operation, where, strength),))
    return made if gate is None else made.when(gate)


@pytest.fixture(scope="module")
def vllm() -> Iterator[Any]:
    before = {name: os.environ.get(name) for name in SETTINGS}
    os.environ.update(SETTINGS)
    made = LM.load(engine="vllm", **TINY)
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    yield made
    made.close()


def forget(vllm: Any) -> None:
    assert vllm.llm.reset_prefix_cache()


def test_its_passes_run_the_operators_of_graphs(vllm: Any) -> None:
    (hello,) = vllm._rpc("trimtab_hello")
    assert hello["static"]
    assert vllm._link.capacity.rank == 4


@pytest.mark.parametrize(
    ("name", "where"), [(name, [Positions.span(4, 9), Positions.prompt()][i % 2]) for i, name in enumerate(OPERATIONS)]
)
def test_activations_are_those_of_transformers(vllm: Any, lm: LM, name: str, where: Positions) -> None:
    """Behind the steered block and behind later ones; at tokens that aren't steered nothing has changed there."""
    both = steering(name, where) + Steering((Edit(Site(10), Add(direction(7, 3.0)), Positions.span(6, 12)),))
    sites, everywhere = [Site(9), Site(10), Site(14)], Positions.prompt()
    ours = vllm.capture(PROMPTS[5], sites, everywhere, steering=both)[0]
    with lm.steered(both):
        theirs = lm.capture(PROMPTS[5], sites, everywhere)[0]
    for site in sites:
        torch.testing.assert_close(ours[site], theirs[site], rtol=2e-4, atol=2e-3)


@pytest.mark.parametrize("kind", ["heads", "neurons", "attention", "mlp", "keys"])
def test_sites_inside_of_blocks_are_those_of_transformers(vllm: Any, lm: LM, kind: str) -> None:
    """What is added, scaled and projected there; and what is read there."""
    site, width = Site(10, kind), vllm._link.inside[kind]
    generator = torch.Generator().manual_seed(3)
    vector, mask, unit = torch.randn(3, width, generator=generator)
    edits = (
        Edit(site, Add(vector / vector.norm()), Positions.span(2, 6)),
        Edit(site, ScaleElements((mask > 0).float()), Positions.span(5, 9)),
        Edit(site, Ablate(unit / unit.norm()), Positions.prompt()),
    )
    sites, everywhere = [site, Site(10), Site(14)], Positions.prompt()
    ours = vllm.capture(PROMPTS[5], sites, everywhere, steering=Steering(edits))[0]
    with lm.steered(Steering(edits)):
        theirs = lm.capture(PROMPTS[5], sites, everywhere)[0]
    plain = lm.capture(PROMPTS[5], [Site(10)], everywhere)[0][Site(10)]
    for inner_site in sites:
        torch.testing.assert_close(ours[inner_site], theirs[inner_site], rtol=5e-4, atol=2e-3)
    assert not torch.allclose(ours[Site(10)], plain, rtol=5e-4, atol=2e-3)


def test_scores_are_scaled_by_keys(vllm: Any, lm: LM) -> None:
    """Beside unsteered requests of the same prompts, which come from the prefix cache in the end."""
    heeded = emphasis(ScaleScores(1.4), [(24, 30), (40, 44)], range(8, 20))
    prompts, rows = [LONG, LONG, f"{LONG} The end.", f"{LONG} The end."], [None, heeded, heeded, None]
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "logprobs": True}
    theirs = lm.generate(prompts, [row and by_keys(row) for row in rows], **options)
    forget(vllm)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        ours = vllm.generate([prompts[i] for i in order], [rows[i] for i in order], **options)
        for i, answer in zip(order, ours, strict=True):
            assert answer.token_ids == theirs[i].token_ids
            assert answer.logprobs == pytest.approx(theirs[i].logprobs, abs=2e-3)
    assert theirs[0].logprobs != pytest.approx(theirs[1].logprobs, abs=2e-2)


def test_a_batch_of_many_mixes_says_what_transformers_says(vllm: Any, lm: LM) -> None:
    """32 requests, all kinds, in fewer slots than there are steerings: they wait, join, are cut and preempted."""
    places = [Positions.generated(), Positions.from_last_prompt_token(), Positions.window(2, 9)]
    rows: list[Any] = [
        (0.5 + 0.03 * i) * steering(list(OPERATIONS)[i % len(OPERATIONS)], places[i % 3]) for i in range(32)
    ]
    rows[3::8] = [None] * 4
    rows[4::8] = [added(i, 3.0, positions=places[i % 3]) for i in range(4)]
    prompts = [PROMPTS[i % 20] for i in range(32)]
    forget(vllm)
    ours = vllm.generate(prompts, rows, max_new_tokens=NEW)
    theirs = lm.generate(prompts, rows, max_new_tokens=NEW, logprobs=True, batch_size=32)
    same = [a.token_ids == b.token_ids for a, b in zip(ours, theirs, strict=True)]
    assert sum(same) >= 29
    for i in (i for i, equal in enumerate(same) if not equal):  # they part at a near-tie
        at = next(k for k, (a, b) in enumerate(zip(ours[i].token_ids, theirs[i].token_ids, strict=False)) if a != b)
        assert theirs[i].logprobs[at] < -0.6
    plain = vllm.generate(prompts[3::8], max_new_tokens=NEW)
    assert [a.token_ids for a in plain] == [ours[i].token_ids for i in range(3, 32, 8)]
    vllm.generate("Hi", max_new_tokens=1)  # the worker hears of the last ones with the next step
    (hello,) = vllm._rpc("trimtab_hello")
    assert (hello["slots_used"], hello["maps_used"], hello["requests"]) == (0, 0, 0)
    assert not any(vllm._engine.engine_core.engine_core.scheduler._trimtab_room.users)


def test_nothing_means_nothing(vllm: Any) -> None:
    """Strength 0 and a gate that stays shut, at the prompt or at each token: to the bit."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "logprobs": True, "chat": False}
    forget(vllm)
    plain = vllm.generate(PROMPTS[:8], **options)
    shut = Steering((Edit(Site(10), Ablate(direction(3)), Positions.all()),)).when(SHUT)
    rows = [None, shut, 0.0 * added(), shut, None, steering("map", Positions.all()), shut, added(3)]
    forget(vllm)
    mixed = vllm.generate(PROMPTS[:8], rows, **options)
    for i in range(8):
        assert (mixed[i].logprobs == plain[i].logprobs) == (i not in (5, 7)), i


def test_a_gate_of_the_prompt_is_decided_by_what_graphs_keep(vllm: Any, lm: LM) -> None:
    value = float(lm.capture(LONG, [8])[0][Site(8)][0] @ direction(3))
    assert float(vllm.capture(LONG, [8])[0][Site(8)][0] @ direction(3)) == pytest.approx(value, abs=1e-2)
    for threshold, acts in ((value - 0.1, True), (value + 0.1, False)):
        gated = steering("ablation", Positions.generated()).when(Threshold(Site(8), direction(3), threshold))
        for prompt in (LONG, PROMPTS[3]):
            answer = vllm.generate(prompt, gated, max_new_tokens=2)[0]
            assert prompt != LONG or bool(answer.applied.edits) == acts


def test_what_graphs_cant_do_is_said_before_a_request_runs(vllm: Any) -> None:
    turned = Steering((Edit(Site(10), Rotate(direction(6), angle=0.3), Positions.all()),))
    with pytest.raises(UnsupportedError, match="support only additions"):
        vllm.generate(PROMPTS[0], turned, max_new_tokens=1)
    with pytest.raises(UnsupportedError, match="rank 5, more than 4"):
        vllm.check(Steering((Edit(Site(10), read_write(1, 5)),)))
    assert vllm.generate(PROMPTS[0], max_new_tokens=1)
