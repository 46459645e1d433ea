"""The cost of choosing tokens: a step of a batch of 16 rows, sampled or with log-probabilities, against a greedy one.

Batches of the same prompts run in rotation, in one process, and none of their rows ends early. Target: a sampled step
takes at most 1.3 times as long as a greedy one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial

from benchmarks.harness import Result, Target, interleave, ratios, summarized
from benchmarks.static import PROMPTS
from trimtab.engines.transformers.batch_row import GenerationRequest
from trimtab.engines.transformers.decode import GenerationBatch
from trimtab.engines.transformers.sampling import GREEDY, Sampling
from trimtab.lm import LM

ROWS = 16
SAMPLED = Target(1.3, at_least=False)
ALTERNATIVES = 5
WARM_UP = 3
"""Steps in which constant data is moved to where it is needed."""


def run(lm: LM, rounds: int, tokens: int, decodings: list[str]) -> Iterator[Result]:
    """The median time of a step over `tokens` steps, for each way of decoding, and its ratio to a greedy one."""
    lm.model.generation_config.eos_token_id = None
    case = f"a step of {ROWS} rows"
    names = ["greedy", *(name for name in decodings if name != "greedy")]
    values = interleave({name: partial(_step, lm, name, tokens) for name in names}, rounds, case=case)
    for name in names:
        yield summarized(case, name, "ms", values[name])
        if name != "greedy":
            target = SAMPLED if name == "sampled" else None
            yield summarized(case, f"{name} / greedy", "ratio", ratios(values[name], values["greedy"]), target)


def _step(lm: LM, name: str, tokens: int) -> float:
    """The median time of a step in milliseconds, over `tokens` steps after the prefill."""
    batch = GenerationBatch(lm.model, lm.tokenizer, lm.layout)
    for seed, prompt in enumerate(PROMPTS[:ROWS]):
        batch.insert(
            GenerationRequest(
                tuple(lm.encode(prompt)),
                max_new_tokens=tokens + WARM_UP + 1,
                sampling=Sampling(1.0, 0.9, seed=seed) if name == "sampled" else GREEDY,
                alternatives=ALTERNATIVES if name == "logprobs" else None,
            )
        )
    for _ in range(WARM_UP):
        batch.step()
    times = []
    for _ in range(tokens):
        began = time.perf_counter()
        rows = len(batch.step())
        times.append((time.perf_counter() - began) * 1000)
        assert rows == ROWS, "a row ended early"
    return statistics.median(times)
