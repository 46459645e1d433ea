"""A server under load for as long as `--load-seconds` says: good clients, bad ones, and what is left of it afterwards.

pytest tests/serve/test_under_load.py -m long --load-seconds 600 -s
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve.conftest import NAMES
from serve.test_validation import HOSTILE

pytestmark = [pytest.mark.long, pytest.mark.slow]
KEY = {"Authorization": "Bearer ann"}
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
FINE = {503, 504}
"""Statuses of 500 and more that mean that the server is busy, not that it is broken."""


@dataclass
class Seen:
    """What all clients saw together."""

    url: str
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    statuses: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    streams: Counter[str] = field(default_factory=Counter)

    def note(self, what: str, status: int, text: str = "") -> None:
        with self.lock:
            self.statuses[f"{what} {status}"] += 1
            if status >= 500 and status not in FINE:
                self.broken.append(f"{what} {status}: {text[:300]}")

    @property
    def where(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)


def body_of(chance: random.Random, **more: Any) -> dict[str, Any]:
    words = "The sea is wide and blue. " * chance.randint(1, 6)
    steering = [{"name": chance.choice(NAMES), "strength": chance.uniform(-2, 2)} for _ in range(chance.randint(0, 2))]
    body: dict[str, Any] = {
        "model": "trimtab",
        "prompt": words,
        "max_tokens": chance.randint(1, 60),
        "n": chance.choice([1, 1, 3]),
    }
    return {**body, "temperature": chance.choice([0, 0.7]), "steering": steering, **more}


def streaming(seen: Seen, chance: random.Random) -> None:
    with httpx.stream(
        "POST", seen.url + TEXTS, json=body_of(chance, stream=True), headers=KEY, timeout=120
    ) as response:
        last, at = "", time.monotonic()
        for line in response.iter_lines() if response.status_code == 200 else ():
            if line:
                now = time.monotonic()
                with seen.lock:
                    seen.gaps.append(now - at)
                last, at = line, now
        seen.note("stream", response.status_code)
        if response.status_code == 200:
            with seen.lock:
                seen.streams["whole" if last == "data: [DONE]" else f"ended with {last[:80]!r}"] += 1


def whole(seen: Seen, chance: random.Random) -> None:
    rejection = chance.random() < 0.1
    body = body_of(chance, **({"rejection": {"ladder": "strength"}, "n": 1} if rejection else {}))
    response = httpx.post(seen.url + TEXTS, json=body, headers=KEY, timeout=120)
    seen.note("whole", response.status_code, response.text)


def wrong(seen: Seen, chance: random.Random) -> None:
    path, body = HOSTILE[chance.choice(sorted(HOSTILE))]
    data = json.dumps(body).encode()[: chance.choice([1 << 20, 5000])]
    response = httpx.post(
        seen.url + path, content=data, headers={**KEY, "Content-Type": "application/json"}, timeout=120
    )
    seen.note("wrong", response.status_code, response.text)


def strange(seen: Seen, chance: random.Random) -> None:
    path = chance.choice([TEXTS, "/v1/steerings/x", "/metrics", "/x", "/"])
    response = httpx.request(
        chance.choice(["GET", "POST", "PUT", "DELETE"]), seen.url + path, content=b"x" * 3000, timeout=120
    )
    seen.note("strange", response.status_code, response.text)


def noise(seen: Seen, chance: random.Random) -> None:
    """Bytes, half a head, half a body; each connection is held for a while."""
    begun = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer ann\r\n"
    data = chance.choice(
        [chance.randbytes(chance.randint(1, 300)), begun, begun + b"Content-Length: 90000\r\n\r\n{" + b" " * 50_000]
    )
    with socket.create_connection(seen.where, timeout=30) as raw, suppress(OSError):
        raw.sendall(data)
        raw.settimeout(chance.uniform(0.1, 15))
        got = raw.recv(4096)
        if got.startswith(b"HTTP"):
            seen.note("noise", int(got.split()[1]))


def leaving(seen: Seen, chance: random.Random) -> None:
    data = json.dumps(body_of(chance, stream=True, max_tokens=60)).encode()
    begun = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer ann\r\n"
    begun += f"Content-Length: {len(data)}\r\n"
    with socket.create_connection(seen.where, timeout=30) as raw, suppress(OSError):
        raw.sendall(begun.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        raw.settimeout(30)
        for _ in range(chance.randint(0, 5)):
            raw.recv(1024)
    seen.note("leaving", 0)


def bringing(data: bytes) -> Callable[[Seen, random.Random], None]:
    def bring(seen: Seen, chance: random.Random) -> None:
        name = f"mine{threading.get_ident() % 97}"
        sent = bytearray(data)
        if chance.random() < 0.5:
            sent[chance.randrange(len(sent))] ^= 1 << chance.randrange(8)
        kind = {**KEY, "Content-Type": "application/octet-stream"}
        response = httpx.put(f"{seen.url}/v1/steerings/{name}", content=bytes(sent), headers=kind, timeout=120)
        seen.note("bring", response.status_code, response.text)
        if response.status_code == 201:
            body = body_of(chance, steering=[{"name": name}], n=1)
            response = httpx.post(seen.url + TEXTS, json=body, headers=KEY, timeout=120)
            seen.note("use", response.status_code, response.text)
        response = httpx.delete(f"{seen.url}/v1/steerings/{name}", headers=KEY, timeout=120)
        seen.note("delete", response.status_code, response.text)

    return bring


def forever(seen: Seen, client: Callable[[Seen, random.Random], None], seed: int) -> None:
    chance = random.Random(seed)
    while not seen.stop.is_set():
        try:
            client(seen, chance)
        except httpx.TransportError as error:
            seen.note(f"{client.__name__} {type(error).__name__}", 0)
        except OSError:
            time.sleep(0.1)


def memory(pid: int) -> float:
    """MiB that the process holds."""
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) / 1024


def test_a_long_load(
    start: Callable[..., Any], steerings: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    seconds = request.config.getoption("--load-seconds")
    log, policy = tmp_path / "a.jsonl", tmp_path / "p.json"
    policy.write_text(
        json.dumps({"keys": [{"name": "ann", "sha256": hashlib.sha256(b"ann").hexdigest(), "add": True}]})
    )
    server = start("--policy", str(policy), "--audit", str(log), "--upload", "--max-tokens", "60", "--rows", "8")
    seen = Seen(server.url)
    brings = bringing((steerings / "s0.safetensors").read_bytes())
    kinds = [streaming] * 4 + [whole] * 2 + [wrong, strange, noise, noise, noise, leaving, brings]
    threads = [threading.Thread(target=forever, args=(seen, kind, i)) for i, kind in enumerate(kinds)]
    for thread in threads:
        thread.start()
    held: list[tuple[float, int, float]] = []
    began = time.monotonic()
    while (at := time.monotonic() - began) < seconds and server.process.poll() is None:
        held.append((at, sum(seen.statuses.values()), memory(server.process.pid)))
        time.sleep(min(1.0, seconds / 20))
    seen.stop.set()
    for thread in threads:
        thread.join(180)
    ended = server.stop()

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    events = Counter(line["event"] for line in lines)
    begun = [line["request"] for line in lines if line["event"] == "begun"]
    over = [line["request"] for line in lines if line["event"] == "ended"]
    gaps = sorted(seen.gaps)
    warm = next(held_ for at, _, held_ in held if at >= min(0.25 * seconds, 120))
    report = {
        "seconds": round(held[-1][0]),
        "requests": held[-1][1],
        "statuses": dict(sorted(seen.statuses.items())),
        "streams": dict(seen.streams),
        "largest_gap_s": round(gaps[-1], 2),
        "gap_p99_s": round(gaps[int(0.99 * len(gaps))], 2),
        "rss_mib": [round(each) for _, _, each in held[:: max(1, len(held) // 12)]],
        "audit": dict(events),
        "lost": len(set(begun) - set(over)),
    }
    print(json.dumps(report, indent=1))
    assert ended == 0, server.log.read_text()[-3000:]
    assert not seen.broken, seen.broken[:5]
    assert "Traceback" not in server.log.read_text(), server.log.read_text()[-3000:]
    assert set(seen.streams) == {"whole"}
    assert sorted(begun) == sorted(over)
    assert len(set(begun)) == len(begun)
    assert held[-1][2] < 1.2 * warm + 50
