"""How long a stream stalls while the server prefills another client's long prompt.

A prompt is prefilled in chunks, and between two chunks every other request gets a token. So no wait should be longer
than two chunks: the one that is running when a token is due, and the token's own step. A chunk's time is measured in
the same round, with the same prompt (with another beginning) and no other requests.
"""

from __future__ import annotations

import json
import math
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.harness import Report, Target, summarized
from benchmarks.machine import machine, versions
from benchmarks.serve import process, random_steerings
from trimtab.engines.transformers.chunked_prefill import CHUNK

PATIENCE = 600.0
ENDLESS = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,"
"""A prompt that a model continues for long."""
MOST = Target(2, at_least=False)
"""The maximum wait for a token, in chunks."""


def run(model: str | None, tokens: int, rounds: int) -> Report:
    """The longest wait of a stream in each round, in seconds and in chunks, with a long prompt of `tokens` tokens."""
    from trimtab.engines.transformers.default_model import default_folder
    from trimtab.lm import LM

    folder = default_folder() if model is None else Path(model)
    lm = LM.load(folder, dtype="float32")
    prompts = [_prompt(lm, tokens, i) for i in range(2 * rounds)]
    chunks: list[float] = []
    waits: list[float] = []
    usual: list[float] = []
    with ExitStack() as stack:
        made = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        random_steerings(lm, made)  # a server has some
        limits = ["--max-tokens", "4096", "--no-playground"]
        url, _ = stack.enter_context(process(folder, made, limits))
        for i in range(rounds):
            started = time.perf_counter()
            _drain(url, prompts[2 * i], 1)
            chunks.append((time.perf_counter() - started) / math.ceil(tokens / CHUNK))
            gaps = _gaps_beside(url, prompts[2 * i + 1])
            waits.append(max(gaps))
            usual.append(median(gaps))
    case = f"{tokens} tokens in chunks of {CHUNK}"
    results = (
        summarized(case, "a chunk", "s", chunks),
        summarized(case, "longest wait for a token", "s", waits),
        summarized(case, "median wait for a token", "s", usual),
        summarized(case, "longest wait, in chunks", "", [w / c for w, c in zip(waits, chunks, strict=True)], MOST),
    )
    return Report("gaps", machine(), {**versions(), "model": folder.name}, results)


def _prompt(lm: Any, tokens: int, seed: int) -> list[int]:
    """Token ids of a text with a unique beginning, so that none of it can be in a cache."""
    text = f"{seed}: " + "The tide comes in and goes out, and the boats lie in the mud. " * tokens
    return list(lm.tokenizer(text)["input_ids"][:tokens])


def _drain(url: str, prompt: Any, count: int) -> None:
    for _ in _stream(url, prompt, count):
        pass


def _gaps_beside(url: str, prompt: list[int]) -> list[float]:
    """Seconds between the tokens of a stream, from the arrival of a long prompt to its first token."""
    times: list[float] = []
    running, read = threading.Event(), threading.Event()

    def listen() -> None:
        for _ in _stream(url, ENDLESS, 2000):
            times.append(time.perf_counter())
            if len(times) == 5:
                running.set()
            if read.is_set():
                return

    listener = threading.Thread(target=listen)
    listener.start()
    if not running.wait(PATIENCE):
        raise RuntimeError("the stream didn't begin")
    started = time.perf_counter()
    _drain(url, prompt, 1)
    if not listener.is_alive():
        raise RuntimeError(f"the stream ended after {len(times)} tokens, before the prompt was prefilled")
    read.set()
    listener.join(PATIENCE)
    before = [moment for moment in times if moment < started][-1:]
    during = before + [moment for moment in times if moment >= started]
    return [later - earlier for earlier, later in pairwise(during)]


def _stream(url: str, prompt: Any, count: int) -> Iterator[dict[str, Any]]:
    body = {"model": "trimtab", "prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as response:
        if response.status_code != 200:
            raise RuntimeError(response.read().decode())
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))
