"""Serving: tokens per second and latency at 1, 8 and 32 clients, steered against unsteered, and against a peer.

Both servers run in their own processes on the same machine with the same model, in float32. Rounds alternate between
steered and unsteered requests to one trimtab server (each client has one of eight steerings), and unsteered ones to
`transformers serve`; each client sends one request and waits for its response. No prompt occurs twice, as transformers
would prefill it only once. Requests are greedy, sampled (temperature 1, top_p 0.9), or greedy with the
log-probabilities of five tokens per position, which `transformers serve` doesn't support. Target: steered at least 0.97
of unsteered, and at least as fast as transformers. How much longer a sampled step takes than a greedy one is measured
without a server (`steps`).
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from benchmarks import steps
from benchmarks.harness import Report, Result, Target, interleave, ratios, summarized
from benchmarks.machine import machine, versions
from benchmarks.static import PROMPTS, Case, residual_norms, steerings_of

if TYPE_CHECKING:
    from trimtab import LM

CLIENTS = (1, 8, 32)
STEERED = Target(0.97)
AGAINST_PEER = Target(1.0)
READY_SECONDS = 300
BLOCKS, PASS = 64, 4096
"""The peer's cache size in blocks of 256 tokens, and the number of tokens in a forward pass: more than is needed here.
By default, it takes most of the machine's memory.
"""
SERIAL = count(1)


SAMPLED = {"temperature": 1.0, "top_p": 0.9}
DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": SAMPLED,
    "logprobs": {"temperature": 0, "logprobs": True, "top_logprobs": steps.ALTERNATIVES},
}
"""The options that each way of decoding adds to a request."""
PEER_DECODES = ("greedy", "sampled")


@dataclass(frozen=True)
class Server:
    """A server's URL, its name for the model, and the further options it needs."""

    url: str
    model: str
    more: Mapping[str, Any]


def run(rounds: int, tokens: int, clients: Sequence[int], decodings: Sequence[str], *, peer: bool) -> Report:
    """All ways of decoding with all numbers of clients, compared with `transformers serve` if `peer` is true."""
    from trimtab import LM
    from trimtab.engines.transformers.default_model import default_folder

    folder = default_folder()
    lm = LM.load(folder, dtype="float32")
    results: list[Result] = []
    with ExitStack() as stack:
        made = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = random_steerings(lm, made)
        if set(decodings) != {"greedy"}:
            results += steps.run(lm, rounds, tokens, list(decodings))
        del lm
        ours = stack.enter_context(_trimtab(folder, made, max(clients)))
        for decoding in decodings:
            # it decodes all requests with the settings of the first one
            theirs = _transformers(folder, decoding) if peer and decoding in PEER_DECODES else nullcontext()
            with theirs as other:
                for count in clients:
                    results += _case(ours, other, names, decoding, count, rounds, tokens)
    return Report("serve", machine(), versions(), tuple(results))


def random_steerings(lm: LM, made: Path) -> list[str]:
    """Eight files of one vector at every layer, with small norms so that the text stays intact."""
    from trimtab import Card, save

    case = Case("eight", 8, different=True)
    for i, steering in enumerate(steerings_of(lm, case, residual_norms(lm))):
        save(replace(steering, card=Card("random", model=lm.identity)), made / f"s{i}.safetensors")
    return [f"s{i}" for i in range(8)]


def _case(
    ours: Server, theirs: Server | None, names: list[str], decoding: str, clients: int, rounds: int, tokens: int
) -> Iterator[Result]:
    waits: dict[str, list[float]] = {}

    def load(name: str, server: Server, steerings: Sequence[str | None]) -> Callable[[], float]:
        return lambda: _load(server, steerings, decoding, tokens, waits.setdefault(name, []))

    runs = {
        "unsteered": load("unsteered", ours, [None] * clients),
        "steered": load("steered", ours, [names[i % 8] for i in range(clients)]),
    }
    if theirs is not None:
        runs["transformers"] = load("transformers", theirs, [None] * clients)
    case = f"{decoding}, {clients} client{'s' * (clients > 1)}"
    values = interleave(runs, rounds, case=case)
    for name in runs:
        yield summarized(case, name, "tokens/s", values[name])
        yield Result(case, f"{name}, median latency", statistics.median(waits[name]), "s")
    yield summarized(case, "steered / unsteered", "ratio", ratios(values["steered"], values["unsteered"]), STEERED)
    if theirs is not None:
        against = ratios(values["unsteered"], values["transformers"])
        yield summarized(case, "unsteered / transformers", "ratio", against, AGAINST_PEER)


def _load(server: Server, steerings: Sequence[str | None], decoding: str, tokens: int, waits: list[float]) -> float:
    """Tokens per second with one request per client, all at once."""

    def ask(number: int) -> int:
        body: dict[str, Any] = {
            "model": server.model,
            "messages": [{"role": "user", "content": f"{next(SERIAL)}. {PROMPTS[number % len(PROMPTS)]}"}],
            "max_tokens": tokens,
            **DECODINGS[decoding],
            **server.more,
        }
        if (name := steerings[number]) is not None:
            body["steering"] = [{"name": name}]
        began = time.perf_counter()
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=600)
        answer.raise_for_status()
        waits.append(time.perf_counter() - began)
        return int(answer.json()["usage"]["completion_tokens"])

    began = time.perf_counter()
    with ThreadPoolExecutor(len(steerings)) as pool:
        made = sum(pool.map(ask, range(len(steerings))))
    return made / (time.perf_counter() - began)


@contextmanager
def _trimtab(folder: Path, steerings: Path, rows: int) -> Iterator[Server]:
    with process(folder, steerings, ["--rows", str(rows)]) as (url, _):
        yield Server(url, "trimtab", {})


@contextmanager
def process(folder: Path, steerings: Path, options: Sequence[str]) -> Iterator[tuple[str, int]]:
    """`trimtab serve` with a model in float32: its URL, and its process id."""
    port = _free_port()
    command = ["-m", "trimtab", "serve", "--model", str(folder), "--dtype", "float32", "--steerings", str(steerings)]
    with _process([*command, "--port", str(port), *options], f"http://127.0.0.1:{port}", "/readyz") as started:
        yield started


@contextmanager
def _transformers(folder: Path, decoding: str) -> Iterator[Server]:
    """With continuous batching, which is how it serves many clients."""
    port = _free_port()
    start = "from transformers.cli.transformers import main; main()"
    command = ["-c", start, "serve", str(folder), "--dtype", "float32", "--continuous-batching"]
    command += ["--cb-num-blocks", str(BLOCKS), "--cb-max-batch-tokens", str(PASS)]
    with _process([*command, "--port", str(port)], f"http://localhost:{port}", "/health") as (url, _):
        yield Server(url, str(folder), {"generation_config": _settings(folder)} if decoding == "sampled" else {})


def _settings(folder: Path) -> str:
    """The model's generation settings, with sampling: `transformers serve` samples only if these say so."""
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(folder)
    config.update(do_sample=True, top_k=0, **SAMPLED)
    return str(config.to_json_string())


@contextmanager
def _process(command: list[str], url: str, ready: str) -> Iterator[tuple[str, int]]:
    with tempfile.TemporaryFile() as log:
        started = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=dict(os.environ))
        try:
            for _ in range(READY_SECONDS * 2):
                try:
                    if httpx.get(url + ready, timeout=10).status_code == 200:
                        break
                except httpx.TransportError:
                    if started.poll() is not None:
                        log.seek(0)
                        raise RuntimeError(f"the server ended: {log.read()[-2000:].decode(errors='replace')}") from None
                time.sleep(0.5)
            yield url, started.pid
        finally:
            started.terminate()
            started.wait(90)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
