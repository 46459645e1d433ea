"""Steered generation on vLLM against the same vLLM without the plugin: the ratio of their throughputs.

Two engines run in their own processes, one of them without trimtab's plugin; they take turns, in rounds, on the same
prompts. On a CPU the ratio is of CPU time, which other programs disturb less than wall time; on a GPU it is of wall
time. There, `--dummy` runs random weights with a large model's shape.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Report, Result, Target, interleave, ratios, summarized
from benchmarks.machine import machine, versions
from benchmarks.static import DOSE, PROMPTS
from trimtab.engines.vllm.versions import vllm_version
from trimtab.steering import Add, Edit, ReadWrite, ScaleScores, Site, Steering, emphasis

SPEED = Target(0.97)
IDLE = Target(0.99)
BATCHES = (1, 32, 128)
SPAN = (1, 4)
"""Token positions that every prompt has."""
CASES = ("idle", "one vector, one layer", "one vector, every layer", "three vectors, every layer", "32 steerings")
BY_KEYS = ("idle, with room for emphasis by keys", "emphasis by keys")
BY_MAPS = ("idle, with room for maps", "rank 4, every layer", "rank 64, half of the layers")
GROUPS = {"": CASES, "keys": BY_KEYS, "maps": BY_MAPS}
"""Groups of cases that need extra operators, at keys or for maps (`ReadWrite`). Each group has its own engine, so that
other cases don't pay for them.
"""
TARGETS = {"idle": IDLE, "rank 4, every layer": Target(0.95), "rank 64, half of the layers": Target(0.9)}


def run(
    rounds: int, tokens: int, batches: Sequence[int], model: str | None, dummy: bool, options: dict[str, Any]
) -> Report:
    """Each case's throughput relative to that of the engine without the plugin, at each batch size."""
    job = {"model": model, "dummy": dummy, "options": options, "tokens": tokens}
    plain = Contender(job, plugin=False)
    results: list[Result] = []
    try:
        for group in GROUPS:
            ours = Contender({**job, "group": group}, plugin=True)
            try:
                results += _compared(plain, ours, group, rounds, batches)
            finally:
                ours.close()
            if ours.about["graphs"] is not None:
                what = f"captured graphs, with {group}" if group else "captured graphs"
                results.append(Result(what, "sizes", ours.about["graphs"], "", target=Target(1)))
    finally:
        plain.close()
    return Report("vllm", machine(), {**versions(), "vllm": vllm_version()}, tuple(results))


def _compared(plain: Contender, ours: Contender, group: str, rounds: int, batches: Sequence[int]) -> list[Result]:
    results, cases = [], GROUPS[group]
    clock = "cpu" if plain.about["device"] == "cpu" else "wall"
    for batch in batches:
        runs = {"without plugin": plain.timed("none", batch, clock)}
        runs |= {case: ours.timed(case, batch, clock) for case in cases}
        values = interleave(runs, rounds)
        per = "tokens/CPU-s" if clock == "cpu" else "tokens/s"
        for name in runs:
            what = f"{name}, beside {cases[-1]}" if name not in cases and group else name
            results.append(summarized(f"{what}, batch {batch}", "throughput", per, values[name]))
        for case in cases:
            shares, target = ratios(values[case], values["without plugin"]), TARGETS.get(case, SPEED)
            results.append(summarized(f"{case}, batch {batch}", "of without plugin", "ratio", shares, target))
    return results


class Contender:
    """An engine in its own process, which runs a case per call."""

    def __init__(self, job: dict[str, Any], *, plugin: bool) -> None:
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_AOT_COMPILE": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "2"} | ({} if plugin else {"VLLM_PLUGINS": "none"})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.vllm", json.dumps({**job, "plugin": plugin})],
            env={**environment, **os.environ, **({} if plugin else {"VLLM_PLUGINS": "none"})},
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.tokens = job["tokens"]
        self.about = self._answer()

    def timed(self, case: str, batch: int, clock: str) -> Callable[[], float]:
        """A function that runs the case and returns tokens per second by this clock."""

        def once() -> float:
            assert self.process.stdin is not None
            print(json.dumps({"case": case, "batch": batch}), file=self.process.stdin, flush=True)
            return batch * self.tokens / self._answer()[clock]

        return once

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"an engine ended with status {self.process.wait()}; its messages are above")
        return json.loads(line)

    def close(self) -> None:
        """Stop the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def serve(job: dict[str, Any]) -> None:
    """The main loop of a contender's process: start its engine, and run cases until stdin ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # stdout is for results; vLLM's output goes to stderr
    from vllm import LLM, SamplingParams

    from trimtab.engines.transformers.default_model import default_folder

    dummy = {"load_format": "dummy"} if job["dummy"] else {}
    name = job["model"] or str(default_folder())
    if job.get("group"):  # known before the engine starts, so that it has the operators
        from transformers import AutoConfig

        from trimtab.engines.vllm.frontend import NAMES

        shape = AutoConfig.from_pretrained(name).get_text_config()
        for case in GROUPS[job["group"]][1:]:
            NAMES.register(case, _known_before(case, shape.num_hidden_layers, shape.hidden_size))
    llm = LLM(model=name, enable_prefix_caching=False, **dummy, **job["options"])
    config = llm.llm_engine.vllm_config
    text = config.model_config.hf_text_config
    ids = [llm.get_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    steerings = _steerings(text.num_hidden_layers, text.hidden_size) if job["plugin"] else {}
    if job["plugin"]:
        from trimtab.engines.vllm.frontend import NAMES

        for name, steering in steerings.items():
            NAMES.register(name, steering)
    graphs = None
    if config.device_config.device_type != "cpu":
        graphs = len(config.compilation_config.cudagraph_capture_sizes or ())
    print(json.dumps({"device": config.device_config.device_type, "graphs": graphs}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=job["tokens"],
                ignore_eos=True,
                extra_args=_asks(request["case"], i),
            )
            for i in range(request["batch"])
        ]
        prompts = [{"prompt_token_ids": ids[i % len(ids)]} for i in range(request["batch"])]
        wall, cpu = time.perf_counter(), time.process_time()
        llm.generate(prompts, params, use_tqdm=False)
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(spent), file=answers, flush=True)


def _asks(case: str, request: int) -> dict[str, Any] | None:
    if case == "none" or case.startswith("idle"):
        return None
    return {"steering": [{"name": f"different {request % 32}" if case == "32 steerings" else case}]}


def _known_before(case: str, layers: int, width: int) -> Steering:
    """A steering that needs operators which additions don't."""
    if case in BY_KEYS:
        return emphasis(ScaleScores(1.2), [SPAN], range(layers))
    rank, where = (64, range(0, layers, 2)) if case.startswith("rank 64") else (4, range(layers))
    generator = torch.Generator().manual_seed(rank)
    edits = []
    for layer in where:
        read, write = torch.randn(2, rank, width, generator=generator) / width**0.5
        edits.append(Edit(Site(layer), ReadWrite(read, 0.02 * write, torch.zeros(rank))))
    return Steering(tuple(edits))


def _steerings(layers: int, width: int) -> dict[str, Steering]:
    """Random directions, small enough that the text stays intact in a model whose residual norms are near 100."""

    def vector(seed: int, count: int, where: Sequence[int]) -> Steering:
        generator = torch.Generator().manual_seed(seed)
        vectors = [torch.randn(width, generator=generator) for _ in range(count * len(where))]
        edits = [Edit(Site(where[i % len(where)]), Add(v * (100 * DOSE / v.norm()))) for i, v in enumerate(vectors)]
        return Steering(tuple(edits))

    every = range(layers)
    steerings = {
        "one vector, one layer": vector(0, 1, [layers * 2 // 5]),
        "one vector, every layer": vector(1, 1, every),
        "three vectors, every layer": vector(2, 3, every),
    }
    return steerings | {f"different {i}": vector(10 + i, 1, every) for i in range(32)}


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
