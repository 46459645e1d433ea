"""A tiny model in a folder, steerings for it, the application in this process, and a server in one of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="serving needs trimtab[serve]")
pytest.importorskip("httpx", reason="these tests need httpx")

NAMES = [f"s{i}" for i in range(8)]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 180_000  # milliseconds: machines that test are often slow


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from commands.conftest import save_model

    return save_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def tiny_lm(folder: Path) -> Any:
    from trimtab import LM

    return LM.load(folder, device="cpu")


@pytest.fixture(scope="session")
def steerings(tiny_lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight files: additions, clamps and ablations, at several layers and positions."""
    import torch

    from trimtab import Ablate, Add, Card, Edit, Positions, SetProjection, Site, Steering, save

    where = tmp_path_factory.mktemp("steerings")
    rules = [Positions.all(), Positions.from_last_prompt_token(), Positions.generated(), Positions.all_but_first()]
    for i, name in enumerate(NAMES):
        v = torch.randn(32, generator=torch.Generator().manual_seed(i))
        v = v / v.norm()
        operation = [Add(3.0 * v), SetProjection(v, target=2.0), Ablate(v), Add(2.0 * v, keep_norm=True)][i % 4]
        steering = Steering((Edit(Site(i % 3), operation, rules[i // 2]),), Card("manual", model=tiny_lm.identity))
        save(steering, where / f"{name}.safetensors")
    return where


@pytest.fixture
def make_service(tiny_lm: Any, steerings: Path) -> Iterator[Callable[..., Any]]:
    """A service on the tiny model; its threads end with the test."""
    from trimtab.serve.audit import Audit
    from trimtab.serve.library import read_folder
    from trimtab.serve.metrics import Metrics
    from trimtab.serve.policy import Policy
    from trimtab.serve.scheduler import Scheduler
    from trimtab.serve.service import Limits, Service

    made = []

    def make(
        *, policy: Policy | None = None, rows: int = 8, waiting: int = 16, audit: Any = None, **options: Any
    ) -> Service:
        metrics = Metrics()
        scheduler = Scheduler(tiny_lm, rows=rows, max_queued=waiting, finished=metrics.count_answer)
        limits = Limits(**{"max_tokens": 64, **options.pop("limits", {})})
        library = read_folder(tiny_lm, steerings)
        service = Service(tiny_lm, library, scheduler, policy or Policy(), audit or Audit(), metrics, limits, **options)
        made.append(service)
        return service

    yield make
    for service in made:
        service.scheduler.close()


@pytest.fixture
def client_of() -> Iterator[Callable[..., Any]]:
    """A client of a service's application, in this process."""
    from starlette.testclient import TestClient

    from trimtab.serve.app import make_app

    opened = []

    def make(service: Any, *, local: bool = False, **headers: str) -> TestClient:
        client = TestClient(make_app(service, local=local), raise_server_exceptions=False, headers=headers)
        client.__enter__()
        opened.append(client)
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def door_of(tiny_lm: Any, steerings: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A client of vLLM's server, as far as that can be without vLLM, with the door in front of it, and its names."""
    import json
    from functools import partial

    from serve.pretend_vllm import make_app
    from starlette.testclient import TestClient

    from trimtab.engines.vllm.frontend import Names
    from trimtab.engines.vllm.request_context import CLOSED
    from trimtab.serve.vllm.middleware import SteeringMiddleware
    from trimtab.serve.vllm.settings import MiddlewareSettings

    opened = []
    monkeypatch.setenv("TRIMTAB_ADMIN_KEY", "admin")

    def make(policy: dict[str, Any] | None, folder: Path, **options: Any) -> TestClient:
        if policy is not None:
            (folder / "policy.json").write_text(json.dumps(policy))
            options["policy"] = str(folder / "policy.json")
        settings = MiddlewareSettings(**options)
        monkeypatch.setenv(CLOSED, str(int(settings.closes(settings.load_policy({})))))
        names = Names()
        names.load(steerings)
        app = make_app(tiny_lm, names, partial(SteeringMiddleware, settings=settings, names=names))
        client = TestClient(app)
        client.__enter__()
        opened.append(client)
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


@dataclass
class Server:
    process: subprocess.Popen
    url: str
    log: Path

    def stop(self, sig: int = signal.SIGTERM, wait: float = 60) -> int:
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(wait)


@pytest.fixture(scope="session")
def start(folder: Path, steerings: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """`trimtab serve …` in a process of its own, on a free port, without the page unless it is requested.

    Of the tiny model and its steerings, unless others are passed.
    """
    started = []

    def begin(*arguments: str, model: Path | None = folder, known: Path = steerings, **environment: str) -> Server:
        log = tmp_path_factory.mktemp("log") / "err"
        command = [sys.executable, "-m", "trimtab", "serve", "--device", "cpu", "--port", "0", "--no-playground"]
        command += [] if model is None else ["--model", str(model)]
        command += ["--steerings", str(known), *arguments]
        with log.open("wb") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **environment}
            )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://" in line, log.read_text()
        server = Server(process, line.split(" at ")[1].strip(), log)
        started.append(server)
        _until_ready(server)
        return server

    yield begin
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def _until_ready(server: Server) -> None:
    import httpx

    for _ in range(600):
        try:
            if httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200:
                return
        except httpx.TransportError:
            assert server.process.poll() is None, server.log.read_text()
        time.sleep(0.1)
    raise AssertionError("the server didn't get ready")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser without a window."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here; on Debian: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """A page in a context of its own. It must load nothing from elsewhere, and never show a traceback."""
    contexts = []

    def begin(url: str, width: int = 1280, height: int = 900, ready: str = ".tt-head p", script: str = "") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        page = context.new_page()
        page.add_init_script(script)
        page.set_default_timeout(PATIENCE)
        elsewhere: list[str] = []
        failed: list[str] = []
        page.on("request", lambda r: elsewhere.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
        page.on("response", lambda r: failed.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        contexts.append((context, page, elsewhere, failed))
        page.goto(url)
        page.wait_for_selector(ready)
        return page

    yield begin
    for context, page, elsewhere, failed in contexts:
        shown = "" if page.is_closed() else page.inner_text("body")
        context.close()
        assert elsewhere == []
        assert failed == []
        assert "Traceback" not in shown
