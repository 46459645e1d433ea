"""An evaluation that is killed and started again ends with the very file of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LONG = 150
SHORT = 60
ARMS = 5  # unsteered, and two layers by two strengths


def questions_of(tmp_path: Path, count: int) -> Path:
    path = tmp_path / "questions.json"
    rows = [
        {
            "question": f"Is the sea wide{'?' * (n % 5)} {n}\n (A) yes\n (B) no",
            "answer_matching_behavior": "(A)" if n % 3 else "(B)",
            "answer_not_matching_behavior": "(B)" if n % 3 else "(A)",
        }
        for n in range(count)
    ]
    path.write_text(json.dumps(rows))
    return path


def arguments_of(model: Path, steering: Path, questions: Path, out: Path) -> list[str]:
    arguments = ["--model", model, "--device", "cpu", "--data", questions, "--steer", steering, "--strength", "-1,1"]
    arguments += ["--layers", "all", "--batch-size", 1, "--out", out, "--json"]
    return ["eval", "ab", *map(str, arguments)]


def records(out: Path) -> int:
    return max(out.read_bytes().count(b"\n") - 1, 0) if out.exists() else 0


def program(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "trimtab", *arguments]


def kill_after(arguments: list[str], out: Path, count: int) -> None:
    """Start the program, and kill it as soon as there are `count` records in its file."""
    process = subprocess.Popen(program(arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ)
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
@pytest.mark.smoke
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_and_started_again_the_file_is_the_same(
    trimtab: Callable[..., Any], model: Path, steering: Path, tmp_path: Path
) -> None:
    """Only the one that is killed is a process of its own."""
    questions, whole, killed = questions_of(tmp_path, SHORT), tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    done = trimtab(*arguments_of(model, steering, questions, whole))
    assert (done.code, records(whole)) == (0, SHORT * ARMS)
    arguments = arguments_of(model, steering, questions, killed)
    kill_after(arguments, killed, 3)
    assert 3 <= records(killed) < SHORT * ARMS
    assert whole.read_bytes().startswith(killed.read_bytes())
    again = trimtab(*arguments)
    assert killed.read_bytes() == whole.read_bytes()
    assert again.json | {"records": ""} == done.json | {"records": ""}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_twice_and_in_the_middle_of_a_line(model: Path, steering: Path, tmp_path: Path) -> None:
    questions, whole, killed = questions_of(tmp_path, LONG), tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run = program(arguments_of(model, steering, questions, whole))
    done = subprocess.run(run, capture_output=True, check=True)
    assert records(whole) == LONG * ARMS
    arguments = arguments_of(model, steering, questions, killed)
    seen = 0
    for _ in range(2):  # killed twice, each time further on
        kill_after(arguments, killed, seen + 3)
        left = records(killed)
        assert seen + 3 <= left < LONG * ARMS
        assert whole.read_bytes().startswith(killed.read_bytes())
        seen = left
    with killed.open("ab") as stream:  # a kill may come while a line is written
        stream.write(whole.read_bytes()[killed.stat().st_size :][:40])
    again = subprocess.run(program(arguments), capture_output=True, check=True)
    assert killed.read_bytes() == whole.read_bytes()
    resumed, expected = (json.loads(process.stdout) for process in (again, done))
    assert resumed | {"records": ""} == expected | {"records": ""}
