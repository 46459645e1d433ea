"""What it costs a running batch when a steered request joins or leaves: CPU time, minus that of a steady step.

The batch is as large as a server's, with a wide model. Only the steering's part of a step is measured, without the
model and without prefill, in CPU time instead of wall time, which other programs hardly disturb.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Report, Result, Target, summarized
from benchmarks.machine import machine, versions
from trimtab.engines.transformers.batch_session import BatchSession
from trimtab.engines.transformers.layout import Layout, find_layout
from trimtab.engines.transformers.positions import ForwardPass
from trimtab.steering import Add, Edit, Positions, ReadWrite, SetProjection, Site

ROWS, LAYERS, WIDTH = 32, 32, 4096
RANK = 4
PROMPT = 6
TARGET = Target(5.0, at_least=False)


def run(rounds: int) -> Report:
    """Requests with the same steering, and with one each; additions, projections and low-rank maps; at every layer."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(LAYERS, WIDTH, generator=generator) / 100
    units = torch.nn.functional.normalize(vectors)
    operations: dict[str, list[Any]] = {
        "additions": [Add(vector) for vector in vectors],
        "projections": [SetProjection(unit, 1.0) for unit in units],
    }
    layout = _layout()
    results: list[Result] = []
    for name, made in operations.items():
        for apart in (False, True):
            steerings = [
                tuple(
                    Edit(Site(layer), operation, Positions.all(), 1 + apart * number / 1000)
                    for layer, operation in enumerate(made)
                )
                for number in range(ROWS + rounds + 1)
            ]
            case = f"{name}, {'a steering each' if apart else 'one steering'}"
            results += _measured(case, layout, steerings, rounds)
    read = torch.nn.functional.normalize(torch.randn(RANK, WIDTH, generator=generator), dim=-1)
    for apart in (False, True):
        maps = [ReadWrite(read, read * (1 + number / 1000)) for number in range(ROWS + rounds + 1 if apart else 1)]
        steerings = [
            tuple(Edit(Site(layer), maps[number % len(maps)], Positions.all()) for layer in range(LAYERS))
            for number in range(ROWS + rounds + 1)
        ]
        case = f"maps of rank {RANK}, {'a steering each' if apart else 'one steering'}"
        results += _measured(case, layout, steerings, rounds)
    return Report("joins", machine(), versions(), tuple(results))


def _measured(case: str, layout: Layout, steerings: list[tuple[Edit, ...]], rounds: int) -> list[Result]:
    session = BatchSession(layout.decoder, layout)
    x = torch.randn(ROWS, 1, WIDTH)
    for edits in steerings[:ROWS]:
        session.insert(edits, PROMPT)
    with session.hooked([Site(layer) for layer in range(LAYERS)]):
        return _changes(case, session, x, steerings[ROWS:], rounds)


def _changes(case: str, session: BatchSession, x: Tensor, others: list[tuple[Edit, ...]], rounds: int) -> list[Result]:
    _step(session, x)
    times: dict[str, list[float]] = {"a request leaves": [], "a request joins": []}
    for number in range(rounds + 1):
        steady = _timed(partial(_step, session, x))
        left = _timed(partial(_step, session, x), partial(session.remove, number % ROWS))
        joined = _timed(partial(_step, session, x), partial(session.insert, others[number], PROMPT))
        if number:  # the first warms up
            times["a request leaves"].append(left - steady)
            times["a request joins"].append(joined - steady)
    return [summarized(case, metric, "ms", values, TARGET) for metric, values in times.items()]


def _step(session: BatchSession, x: Tensor) -> None:
    """A forward pass without the model: each site's activations are passed to the session."""
    rows = len(session.rows)
    with torch.no_grad():
        session._enter(ForwardPass(rows, 1, PROMPT, None, x.device, None), {}, begins=False).passes += 1
        for layer in range(LAYERS):
            session.edit(Site(layer), x[:rows])
    session.advance()


def _timed(step: Callable[[], None], change: Callable[[], Any] | None = None) -> float:
    """CPU time in milliseconds of a step, and of the change before it."""
    began = time.thread_time()
    if change is not None:
        change()
    step()
    return (time.thread_time() - began) * 1000


def _layout() -> Layout:
    """Blocks of this width, small otherwise."""
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=LAYERS, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, vocab_size=64,
    )  # fmt: skip
    return find_layout(LlamaForCausalLM(config))
