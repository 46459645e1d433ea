"""Plain `vllm serve` with the plugin installed: steering by name over vLLM's own API, and names that come and go."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cases import PROMPTS, added

from trimtab import save
from trimtab.engines.transformers.default_model import default_folder
from trimtab.files.steering_file import steering_to_bytes

KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("steerings")
    for i in range(4):
        save(added(50 + 10 * i, 4.0), folder / f"s{i}.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"TRIMTAB_STEERINGS": str(folder), "TRIMTAB_ADMIN_KEY": "secret", "VLLM_PLUGINS": "trimtab"}
    program = str(Path(sys.executable).with_name("vllm"))
    options = "--enforce-eager --dtype float32 --max-model-len 256 --max-num-seqs 16 --host 127.0.0.1"
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [
                program,
                "serve",
                str(default_folder()),
                *options.split(),
                "--port",
                str(port),
                "--served-model-name",
                "m",
            ],
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TRIMTAB_SLOTS": "4", **given},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert server.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                if ask(f"{base}/health")[0] == 200:
                    break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        yield base
    finally:
        server.terminate()
        server.wait(60)


def ask(
    url: str, body: Any = None, method: str | None = None, headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    """Status and answer."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


def chat(url: str, prompt: str, steering: Any = None) -> tuple[int, Any]:
    more = {} if steering is None else {"vllm_xargs": {"steering": json.dumps(steering)}}
    messages = [{"role": "user", "content": prompt}]
    status, answer = ask(
        f"{url}/v1/chat/completions", {"model": "m", "messages": messages, "max_tokens": 12, "temperature": 0, **more}
    )
    return status, answer["choices"][0]["message"]["content"] if status == 200 else answer


def test_requests_are_steered_by_name(url: str) -> None:
    assert ask(f"{url}/trimtab")[1] == {"steerings": ["s0", "s1", "s2", "s3"], "layers": 30, "width": 576}
    plain = chat(url, PROMPTS[0])
    assert plain[0] == 200
    assert chat(url, PROMPTS[0], [{"name": "s0", "strength": 0}]) == plain
    assert chat(url, PROMPTS[0], [{"name": "s0", "strength": 4}]) != plain
    assert chat(url, PROMPTS[0]) == plain


def test_what_cant_be_honoured_is_answered_with_an_error(url: str) -> None:
    for steering, why in (
        ([{"name": "nobody"}], "no steering 'nobody'; registered: s0, s1, s2, s3"),
        ([{"name": "s0", "positions": "span:2:9999"}], "is not in the prompt"),
        ([{"name": "s0", "layer": 2}], "name, strength and positions"),
    ):
        status, answer = chat(url, PROMPTS[0], steering)
        assert status == 400
        assert why in json.dumps(answer)


def test_many_clients_while_steerings_come_and_go(url: str) -> None:
    """Three slots for four steerings: none is lost, and each answer is what it is alone, but for near-ties."""
    jobs = [
        (PROMPTS[i % 20], None if i % 5 == 4 else [{"name": f"s{i % 5}", "strength": 1 + i % 2}]) for i in range(60)
    ]
    alone = {i: chat(url, *jobs[i]) for i in range(0, 60, 6)}
    changing = steering_to_bytes(added(99))
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(chat, url, *job) for job in jobs]
        for i in range(6):
            put = ask(f"{url}/trimtab/steerings/new{i}", changing, "PUT", KEY)
            assert put[0] == 200
            assert f"new{i}" in put[1]["steerings"]
            assert ask(f"{url}/trimtab/steerings/new{i}", None, "DELETE", KEY)[0] == 200
        done = [answer.result() for answer in answers]
    assert [status for status, _ in done] == [200] * 60
    assert sum(done[i] == one for i, one in alone.items()) >= 9


def test_names_are_changed_only_with_the_key(url: str) -> None:
    assert ask(f"{url}/trimtab/steerings/s0", None, "DELETE", {"Authorization": "Bearer guess"})[0] == 401
    assert "s0" in ask(f"{url}/trimtab")[1]["steerings"]
