"""An evaluation that is killed and started again ends with the very file of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ITEMS = 150
ARMS = 5  # unsteered, and two layers by two strengths


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.json"
    rows = [
        {
            "question": f"Is the sea wide{'?' * (n % 5)} {n}\n (A) yes\n (B) no",
            "answer_matching_behavior": "(A)" if n % 3 else "(B)",
            "answer_not_matching_behavior": "(B)" if n % 3 else "(A)",
        }
        for n in range(ITEMS)
    ]
    path.write_text(json.dumps(rows))
    return path


def command(model: Path, steering: Path, questions: Path, out: Path) -> list[str]:
    given = ["--model", model, "--device", "cpu", "--data", questions, "--steer", steering, "--strength", "-1,1"]
    given += ["--layers", "all", "--batch-size", 1, "--out", out, "--json"]
    return [sys.executable, "-m", "trimtab", "eval", "ab", *map(str, given)]


def records(out: Path) -> int:
    return max(out.read_bytes().count(b"\n") - 1, 0) if out.exists() else 0


def kill_after(arguments: list[str], out: Path, count: int) -> None:
    """Start the program, and kill it as soon as there are `count` records in its file."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ)
    try:
        while records(out) < count:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL  # it was still running
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_and_started_again_the_file_is_the_same(
    model: Path, steering: Path, questions: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    done = subprocess.run(command(model, steering, questions, whole), capture_output=True, check=True)
    assert records(whole) == ITEMS * ARMS
    arguments = command(model, steering, questions, killed)
    seen = 0
    for _ in range(2):  # killed twice, each time further on
        kill_after(arguments, killed, seen + 3)
        left = records(killed)
        assert seen + 3 <= left < ITEMS * ARMS
        assert whole.read_bytes().startswith(killed.read_bytes())
        seen = left
    with killed.open("ab") as stream:  # a kill may come while a line is written
        stream.write(whole.read_bytes()[killed.stat().st_size :][:40])
    again = subprocess.run(arguments, capture_output=True, check=True)
    assert killed.read_bytes() == whole.read_bytes()
    found, expected = (json.loads(one.stdout) for one in (again, done))
    assert found | {"records": ""} == expected | {"records": ""}
