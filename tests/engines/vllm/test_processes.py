"""Engines in processes of their own: what becomes of a killed worker, and of an engine that hasn't the plugin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PRELUDE = """
import json, os
from trimtab import LM, TrimtabError
from cases import PROMPTS, added
OPTIONS = dict(dtype="float32", enforce_eager=True, max_model_len=256, num_gpu_blocks_override=16)
"""


def run(tmp_path: Path, body: str, **environment: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + "if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in body.splitlines()))
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    variables = {**os.environ, "PYTHONPATH": here, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}
    done = subprocess.run([sys.executable, str(script)], env=variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-12000:]
    return done.stdout


@pytest.mark.long
def test_a_killed_worker_is_a_clean_error(tmp_path: Path) -> None:
    """The engine's processes are this one's children, the worker among them."""
    body = """
import signal, subprocess, time
lm = LM.load(engine="vllm", **OPTIONS)
answers = lm.generate(PROMPTS[:4], [None, added(1), None, added(2)], max_new_tokens=8)
again = lm.generate(PROMPTS[:4], [None, added(1), None, added(2)], max_new_tokens=8)
print("same", [a.token_ids for a in answers] == [a.token_ids for a in again])
def children(pid):
    found = [int(p) for p in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]
    return found + [deeper for child in found for deeper in children(child)]
def name(pid):
    try:
        return open(f"/proc/{pid}/comm").read() + open(f"/proc/{pid}/cmdline").read()
    except FileNotFoundError:
        return ""
workers = [pid for pid in children(os.getpid()) if "Worker" in name(pid)]
print("workers", len(workers))
for pid in workers:
    os.kill(pid, signal.SIGKILL)
time.sleep(3)
try:
    lm.generate(PROMPTS[:4], added(1), max_new_tokens=8)
except RuntimeError as error:
    print(type(error).__name__, error)
"""
    out = run(tmp_path, body)
    assert "same True" in out
    assert "workers 1" in out
    assert "EngineDied the vLLM engine of SmolLM2-135M-Instruct has died" in out


def test_an_engine_without_the_plugin_is_refused(tmp_path: Path) -> None:
    body = """
try:
    LM.load(engine="vllm", **OPTIONS)
except TrimtabError as error:
    print("refused:", error)
"""
    out = run(tmp_path, body, VLLM_PLUGINS="none")
    assert "refused: this engine's workers don't know trimtab: its plugin failed to load there" in out


UNHOOK = """
def unhook(worker):  # runs in the worker
    from trimtab.engines.vllm.attach import find_blocks
    runner = worker.worker.model_runner if hasattr(worker, "worker") else worker.model_runner
    find_blocks(runner.get_model(), 30)[12]._forward_hooks.clear()
"""


def test_a_fault_in_a_worker_reaches_the_caller(tmp_path: Path) -> None:
    """A block that has lost its operator, in the engine's process: the request fails in words, others are answered."""
    body = (
        UNHOOK
        + """
lm = LM.load(engine="vllm", **OPTIONS)
lm._engine.collective_rpc(unhook)
try:
    print("served", lm.generate(PROMPTS[:2], [None, added(1)], max_new_tokens=8))
except TrimtabError as error:
    print("raised:", error)
print("unsteered", len(lm.generate(PROMPTS[:2], max_new_tokens=8)))
"""
    )
    out = run(tmp_path, body, VLLM_ALLOW_INSECURE_SERIALIZATION="1")
    assert "served" not in out
    assert "raised: trimtab: behind block 12 the steering should have run once" in out
    assert "unsteered 2" in out


@pytest.mark.long
def test_a_fault_in_a_worker_reaches_a_servers_client(tmp_path: Path) -> None:
    """In the engine that vLLM's server has: what it raises is answered with the reason."""
    body = (
        UNHOOK
        + """
import asyncio
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.exceptions import GenerationError
from trimtab.engines.transformers.default_model import default_folder
from trimtab.engines.vllm.frontend import NAMES

async def main():
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(default_folder()), **OPTIONS))
    NAMES.register("sea", added(1))
    async def ask(name, steering):
        params = SamplingParams(temperature=0, max_tokens=6, extra_args=steering)
        texts = [output.outputs[0].text async for output in engine.generate("The sea is", params, name)]
        print(name, len(texts) > 0)
    await ask("right", {"steering": "sea"})
    await engine.collective_rpc(unhook)
    try:
        await ask("wrong", {"steering": "sea"})
    except GenerationError as error:
        print("raised:", error)
    await ask("unsteered", None)
    engine.shutdown()

asyncio.run(main())
"""
    )
    out = run(tmp_path, body, VLLM_ALLOW_INSECURE_SERIALIZATION="1")
    assert "right True" in out
    assert "wrong" not in out
    assert "raised: trimtab: behind block 12 the steering should have run once" in out
    assert "unsteered True" in out
