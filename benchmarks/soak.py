"""A server under mixed load for a while: errors, lost requests, and whether its memory is stable.

Clients of every kind send requests concurrently, over persistent connections: greedy and sampled answers,
log-probabilities, tool calls, JSON by a schema, the Responses API, streams, canceled streams, and invalid requests.
Targets: no status of 500 or more except that of a full queue, no connection that ends without a response, no stream
without its end, no request whose end isn't in the audit log, and a resident set that, except for noise, is no larger at
the end than halfway.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness import Report, Result, Target
from benchmarks.machine import machine, versions
from benchmarks.serve import process, random_steerings

PATIENCE = 300.0
CHATS, TEXTS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
NONE = Target(0, at_least=False)
LEAST_GROWTH = 8.0
"""The noise of a resident set in MiB, between two minutes in which nothing is retained."""
EVERY = 5.0
"""Seconds between measurements of the memory."""
PAUSE = 0.1
"""The probability that a client pauses after a request, so that idle connections are reused."""
LONGEST_PAUSE = 7.0
ASKS = ("Name three rivers.", "What is a friend?", "How do I boil an egg?", "Tell me about the moon.", "Why read?")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Lyon", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2, 3]}},
    "required": ["n"],
    "additionalProperties": False,
}


@dataclass
class Seen:
    """What all clients observed."""

    names: list[str]
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    endless: int = 0
    gaps: list[float] = field(default_factory=list)

    def note(self, kind: str, response: httpx.Response) -> None:
        """Count a response."""
        status = response.status_code
        with self.lock:
            self.statuses[f"{kind} {status}"] += 1
            if status >= 500 and status != 503:
                self.wrong.append(f"{kind} {status}: {response.text[:200]}")

    @property
    def requests(self) -> int:
        """The number of responses."""
        return sum(self.statuses.values())


Ask = Callable[[httpx.Client, Seen, random.Random], None]


def run(minutes: float, tokens: int, model: str | None) -> Report:
    """The load, for this many minutes, with answers of at most `tokens` tokens."""
    from trimtab.engines.transformers.default_model import default_folder
    from trimtab.lm import LM

    folder = default_folder() if model is None else Path(model)
    with ExitStack() as stack:
        made = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        seen = Seen(random_steerings(LM.load(folder, dtype="float32"), made))
        log = made / "audit.jsonl"
        options = ["--audit", str(log), "--rows", "8", "--max-tokens", str(tokens), "--no-playground"]
        url, pid = stack.enter_context(process(folder, made, options))
        held = _load(url, pid, seen, minutes * 60)
        lost = _lost(log)
    half = held[len(held) // 2 :]
    middle, end = (
        statistics.median(value for _, value in part) for part in (half[: len(half) // 4], half[-len(half) // 4 :])
    )
    for line in (*seen.wrong[:5], *seen.unanswered[:5]):
        print(line, file=sys.stderr)
    case = f"{minutes:g} minutes"
    results = [
        Result(case, "requests", seen.requests, "requests"),
        Result(
            case, "refused as asked for wrongly", sum(n for s, n in seen.statuses.items() if s[-3] == "4"), "requests"
        ),
        Result(case, "status 500 or more", len(seen.wrong), "requests", target=NONE),
        Result(case, "connections that ended without an answer", len(seen.unanswered), "requests", target=NONE),
        Result(case, "streams without an end", seen.endless, "streams", target=NONE),
        Result(case, "lost in the audit log", lost, "requests", target=NONE),
        Result(case, "longest wait for a token", max(seen.gaps, default=0.0), "s"),
        Result(case, "memory halfway", middle, "MiB"),
        Result(case, "memory gained since", end - middle, "MiB", target=Target(LEAST_GROWTH, at_least=False)),
    ]
    return Report("soak", machine(), versions(), tuple(results))


def _load(url: str, pid: int, seen: Seen, seconds: float) -> list[tuple[int, float]]:
    """All clients at once; the server's memory every few seconds, with the number of responses so far."""
    threads = [threading.Thread(target=_forever, args=(url, seen, ask, i)) for i, ask in enumerate(KINDS)]
    for thread in threads:
        thread.start()
    held: list[tuple[int, float]] = []
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        time.sleep(min(EVERY, seconds / 40))
        held.append((seen.requests, _memory(pid)))
        if len(held) % 12 == 0:
            print(f"{time.monotonic() - began:.0f} s: {held[-1][0]} requests, {held[-1][1]:.0f} MiB", file=sys.stderr)
    seen.stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    return held


def _forever(url: str, seen: Seen, ask: Ask, seed: int) -> None:
    chance = random.Random(seed)
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        while not seen.stop.is_set():
            try:
                ask(client, seen, chance)
            except httpx.TransportError as error:
                with seen.lock:
                    seen.unanswered.append(f"{ask.__name__}: {type(error).__name__}: {error}")
            if chance.random() < PAUSE:
                seen.stop.wait(chance.uniform(0, LONGEST_PAUSE))


def _memory(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 2**10


def _lost(log: Path) -> int:
    """The number of requests with a beginning and no end, once the server has had time to write it."""
    for _ in range(60):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        begun, ended = ({line["request"] for line in lines if line["event"] == kind} for kind in ("begun", "ended"))
        if begun == ended:
            return 0
        time.sleep(1)
    return len(begun ^ ended)


# ---- requests --------------------------------------------------------------------------------------------------


def _body(seen: Seen, chance: random.Random, **more: Any) -> dict[str, Any]:
    steering = [
        {"name": chance.choice(seen.names), "strength": chance.uniform(-1, 1)} for _ in range(chance.randint(0, 2))
    ]
    talk = [{"role": "user", "content": " ".join(chance.choices(ASKS, k=chance.randint(1, 8)))}]
    limit = {"max_tokens": chance.randint(1, 48)}
    return {"model": "trimtab", "messages": talk, "temperature": 0, "steering": steering, **limit, **more}


def greedy(client: httpx.Client, seen: Seen, chance: random.Random) -> None:
    seen.note("greedy", client.post(CHATS, json=_body(seen, chance)))


def sampled(client: httpx.Client, seen: Seen, chance: random.Random) -> None:
    body = _body(seen, chance, n=chance.randint(1, 3), temperature=0.8, seed=chance.randint(0, 99))
    seen.note("sampled", client.post(CHATS, json=body))


def logprobs(client: httpx.Client, seen: Seen, chance: random.Random) -> None:
    seen.note("logprobs", client.post(CHATS, json=_body(seen, chance, logprobs=True, top_logprobs=5)))


def tools(client: httpx.Client, seen: Seen, chance: random.Random) -> None:
    response = client.post(CHATS, json=_body(seen, chance, tools=[TOOL], tool_choice="required", max_tokens=48))
    seen.note("tools", response)


def schema(client: httpx.Client, seen: Seen, chance: random.Random) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    seen.note("schema", client.post(CHATS, json=_body(seen, chance, response_format=format)))


def responses(client: httpx.Client, seen: Seen, chance: random.Random) -> None:
    body = {"model": "trimtab", "input": chance.choice(ASKS), "temperature": 0, "max_output_tokens": 24}
    seen.note("responses", client.post(RESPONSES, json=body | {"include": ["message.output_text.logprobs"]}))


def rejecting(client: httpx.Client, seen: Seen, chance: random.Random) -> None:
    steering = [{"name": chance.choice(seen.names)}]
    body = _body(seen, chance, steering=steering, rejection={"ladder": "strength"}, max_tokens=12)
    seen.note("rejection", client.post(CHATS, json=body))


def streamed(client: httpx.Client, seen: Seen, chance: random.Random) -> None:
    with client.stream("POST", CHATS, json=_body(seen, chance, stream=True)) as response:
        last, at = "", time.monotonic()
        for line in _lines(response):
            now = time.monotonic()
            with seen.lock:
                seen.gaps.append(now - at)
            last, at = line, now
        seen.note("streamed", response)
        if response.status_code == 200 and last != "data: [DONE]":
            with seen.lock:
                seen.endless += 1


def cut(client: httpx.Client, seen: Seen, chance: random.Random) -> None:
    with client.stream("POST", CHATS, json=_body(seen, chance, stream=True, max_tokens=48)) as response:
        for _, _line in zip(range(chance.randint(0, 8)), _lines(response), strict=False):
            pass
        if response.status_code != 200:
            response.read()
        seen.note("cut", response)


def wrong(client: httpx.Client, seen: Seen, chance: random.Random) -> None:
    body: dict[str, Any] = _body(seen, chance)
    body |= chance.choice(
        [
            {"messages": []},
            {"steering": [{"name": "nobody"}]},
            {"temperature": -1},
            {"steerng": []},
            {"stop": [1] * 50_000},
            {"messages": [{"role": "user", "content": [{}] * 50_000}]},
            {"metadata": {str(i): i for i in range(20_000)}},
        ]
    )
    seen.note("wrong", client.post(CHATS, json=body))


def _lines(response: httpx.Response) -> Iterator[str]:
    return (line for line in response.iter_lines() if line) if response.status_code == 200 else iter(())


KINDS: tuple[Ask, ...] = (
    greedy, sampled, logprobs, tools, schema, responses, rejecting, streamed, streamed, cut, cut, wrong,
)  # fmt: skip
