"""Steered against unsteered generation: throughput and peak memory. Target: steering costs at most 2 %.

Learned edits read and write several directions at once (`ReadWrite`): with rank 4 at one layer they may cost 3 %, with
rank 64 at every second layer 7 %.

The baseline is unsteered generation through `lm.generate`; transformers' own `generate` runs on the same inputs for
comparison. Directions are random with small norms, so that the text stays intact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Report, Result, Target, interleave, ratios, summarized
from benchmarks.machine import machine, versions
from benchmarks.memory import forget_peak, own_peak, peak_of
from trimtab.lm import LM
from trimtab.steering import Add, Edit, Operation, ReadWrite, Site, Steering

THROUGHPUT = Target(0.98)
MEMORY = Target(1.02, at_least=False)
DOSE = 0.02  # of the residual norm, each vector at each layer

PROMPTS = (
    "What does a trim tab do on a ship?",
    "Write a haiku about the sea.",
    "Explain to a child why the sky is blue.",
    "Name three rivers in Europe.",
    "How do I keep bread fresh for longer?",
    "Give me a short plan for a day in Rome, with two museums and a place for lunch.",
    "What is the difference between a list and a tuple in Python?",
    "Who wrote Don Quixote?",
    "Describe the taste of a lemon without using the word sour.",
    "Why do cats purr?",
    "Suggest a name for a bakery that only sells rye bread, and say why it fits.",
    "How far is the moon?",
    "Write one sentence that begins with every morning.",
    "What should I pack for a week of hiking in the rain in Scotland?",
    "What is a prime number?",
    "Tell me a fact about octopuses that few people know.",
)


@dataclass(frozen=True)
class Case:
    """A batch, and how many random vectors each request has at how many layers (`None`: every layer).

    With a `rank`, each is a random `ReadWrite` of that rank instead; `step` 2 means every second layer.
    """

    name: str
    batch: int
    layers: int | None = None
    vectors: int = 1
    different: bool = False
    rank: int | None = None
    step: int = 1
    throughput: Target = THROUGHPUT


CASES = (
    *(Case(f"one vector, one layer, batch {batch}", batch, layers=1) for batch in (1, 16)),
    *(Case(f"one vector, every layer, batch {batch}", batch) for batch in (1, 4, 8, 12, 16)),
    *(Case(f"three vectors, every layer, batch {batch}", batch, vectors=3) for batch in (1, 16)),
    Case("16 different steerings, every layer, batch 16", 16, different=True),
    *(Case(f"rank 4, one layer, batch {batch}", batch, 1, rank=4, throughput=Target(0.97)) for batch in (1, 16)),
    *(
        Case(f"rank 64, every second layer, batch {batch}", batch, rank=64, step=2, throughput=Target(0.93))
        for batch in (1, 16)
    ),
    Case("16 different of rank 4, one layer, batch 16", 16, 1, different=True, rank=4, throughput=Target(0.97)),
)


def run(rounds: int, tokens: int, only: str = "") -> Report:
    """The throughput and memory of every case whose name contains `only`."""
    cases = [case for case in CASES if only in case.name]
    memory = _memory(cases, tokens)
    lm = LM.load()
    norms = residual_norms(lm)
    speed = [result for case in cases for result in _speed(lm, case, norms, rounds, tokens)]
    return Report("static", machine(), versions(), (*speed, *memory))


def peak(case: str, tokens: int, steered: bool) -> float:
    """The peak memory in MiB of generating under a case's steering, or without it."""
    lm = LM.load()
    chosen = next(c for c in CASES if c.name == case)
    steerings = steerings_of(lm, chosen, residual_norms(lm))
    forget_peak()
    _generate(lm, chosen.batch, steerings if steered else None, tokens)
    return own_peak()


def steerings_of(lm: LM, case: Case, norms: Sequence[float]) -> list[Steering]:
    """The steering of each request of a case: random directions, each `DOSE` of the layer's residual norm."""
    middle = round(0.4 * lm.layout.layers)
    layers = range(0, lm.layout.layers, case.step) if case.layers is None else range(middle, middle + case.layers)

    def vector(seed: int) -> Steering:
        generator = torch.Generator().manual_seed(seed)
        edits = [
            Edit(Site(layer), _operation(lm.layout.width, DOSE * norms[layer], norms[layer], case.rank, generator))
            for _ in range(case.vectors)
            for layer in layers
        ]
        return Steering(tuple(edits))

    if case.different:
        return [vector(seed) for seed in range(case.batch)]
    return [vector(0)] * case.batch


def residual_norms(lm: LM) -> list[float]:
    """The mean norm of the residual stream after each block, at the prompts' last tokens."""
    sites = [Site(layer) for layer in range(lm.layout.layers)]
    captured = lm.capture(PROMPTS, sites)
    return [float(torch.stack([activations[site].norm() for activations in captured]).mean()) for site in sites]


def _operation(width: int, push: float, norm: float, rank: int | None, generator: torch.Generator) -> Operation:
    """A random operation that pushes an activation with this norm by about `push`."""
    if rank is None:
        return Add(_direction(width, push, generator))
    # a reading of about 1 for an activation in any direction
    read = torch.randn(rank, width, generator=generator) / norm
    write = torch.stack([_direction(width, push / rank**0.5, generator) for _ in range(rank)])
    return ReadWrite(read, write, low=0.0)


def _direction(width: int, norm: float, generator: torch.Generator) -> Tensor:
    vector = torch.randn(width, generator=generator)
    return vector * (norm / vector.norm())


def _speed(lm: LM, case: Case, norms: Sequence[float], rounds: int, tokens: int) -> list[Result]:
    steerings = steerings_of(lm, case, norms)
    new = case.batch * tokens
    runs = {
        "transformers": _timed(lambda: _plain(lm, case.batch, tokens), new),
        "unsteered": _timed(lambda: _generate(lm, case.batch, None, tokens), new),
        "steered": _timed(lambda: _generate(lm, case.batch, steerings, tokens), new),
    }
    values = interleave(runs, rounds, case=case.name)
    by_name = [summarized(case.name, name, "tokens/s", values[name]) for name in runs]
    return [
        *by_name,
        summarized(
            case.name, "steered / unsteered", "ratio", ratios(values["steered"], values["unsteered"]), case.throughput
        ),
        summarized(
            case.name,
            "steered / transformers",
            "ratio",
            ratios(values["steered"], values["transformers"]),
            case.throughput,
        ),
    ]


def _memory(cases: Sequence[Case], tokens: int) -> list[Result]:
    one_a_batch = {case.batch: case for case in cases}  # unsteered, cases with the same batch size are the same
    plain = {batch: peak_of("static", "--case", c.name, "--tokens", str(tokens)) for batch, c in one_a_batch.items()}
    results = []
    for case in cases:
        ours = peak_of("static", "--case", case.name, "--tokens", str(tokens), "--steered")
        metric = "peak memory, steered / unsteered"
        results.append(Result(case.name, metric, ours / plain[case.batch], "ratio", target=MEMORY))
    return results


def _timed(work: Callable[[], Any], new_tokens: int) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        work()
        return new_tokens / (time.perf_counter() - start)

    return run


def _generate(lm: LM, batch: int, steerings: Sequence[Steering] | None, tokens: int) -> Any:
    return lm.generate(PROMPTS[:batch], steerings, max_new_tokens=tokens, min_new_tokens=tokens)


def _plain(lm: LM, batch: int, tokens: int) -> Any:
    """Transformers' own generation on the same inputs: the same template, order, padding and options."""
    ids = sorted((lm.encode(prompt) for prompt in PROMPTS[:batch]), key=len, reverse=True)
    width = len(ids[0])
    pad = lm.tokenizer.pad_token_id
    padded = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in ids], device=lm.model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in ids], device=lm.model.device)
    output = lm.model.generate(
        input_ids=padded,
        attention_mask=mask,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=pad,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    return lm.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
