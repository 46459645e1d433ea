"""Calls to every worker, written once for vLLM's synchronous and asynchronous engines."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

Rpc = Generator[tuple[str, tuple[Any, ...]], Any, Any]
"""Yields calls `(method, arguments)` to every worker, and is sent the list of their return values."""


def run(calls: Rpc, engine: Any) -> Any:
    """Make the calls through an `LLMEngine`, and return the generator's return value."""
    answer: Any = None
    error: Exception | None = None
    while True:
        try:
            method, args = calls.send(answer) if error is None else calls.throw(error)
        except StopIteration as done:
            return done.value
        try:
            answer, error = engine.collective_rpc(method, args=args), None
        except Exception as failed:
            answer, error = None, failed


async def run_async(calls: Rpc, engine: Any) -> Any:
    """Like `run`, through an `AsyncLLM`; under data parallelism, every engine is called."""
    answer: Any = None
    error: Exception | None = None
    while True:
        try:
            method, args = calls.send(answer) if error is None else calls.throw(error)
        except StopIteration as done:
            return done.value
        try:
            if engine.vllm_config.parallel_config.data_parallel_size > 1:
                each = await engine.engine_core.call_utility_all_async("collective_rpc", method, None, args, None)
                answer, error = [result for answers in each for result in answers], None
            else:
                answer, error = await engine.collective_rpc(method, args=args), None
        except Exception as failed:
            answer, error = None, failed
