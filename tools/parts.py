"""Run targets of the Makefile in parallel, each with its own log. `make test` and `make test-all` use it.

    python tools/parts.py lint types test-newest test-vllm

As many run at once as there are cores, in the given order. When a target ends, a line is printed with the last line of
its log, which for tests is pytest's. The logs of failed targets are shown at the end, and then the exit status is 1.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build" / "logs"
CLOSING = re.compile(r"(=+ )?(\d+ [a-z]+\b|no tests ran).* in [\d.]+s")  # pytest's last line
SHOWN = 200  # lines shown from the log of a failed part
PATIENCE = 15  # seconds that a part has to stop


def main(waiting: list[str]) -> int:
    LOGS.mkdir(parents=True, exist_ok=True)
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, interrupted)
    at_once = int(os.environ.get("PARTS", os.cpu_count() or 1))
    running: dict[str, subprocess.Popen[bytes]] = {}
    began: dict[str, float] = {}
    failed: list[str] = []
    print(f"{', '.join(waiting)}: {at_once} at once; to follow them: tail -f build/logs/*.log", flush=True)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                part = waiting.pop(0)
                began[part], running[part] = time.monotonic(), start(part)
            time.sleep(0.2)
            for part, process in list(running.items()):
                if process.poll() is not None:
                    del running[part]
                    failed += [part] if process.returncode else []
                    minutes, seconds = divmod(round(time.monotonic() - began[part]), 60)
                    print(
                        f"\n{part} {'FAILED' if process.returncode else 'passed'} after {minutes}:{seconds:02}",
                        flush=True,
                    )
                    print("\n".join(closing_lines(part)), flush=True)
    except KeyboardInterrupt:
        print(f"\nstopping {', '.join(running)}", flush=True)
        return 130
    finally:
        stop(running)
    for part in failed:
        lines = log(part).read_text(errors="replace").splitlines()
        print(f"\n===== {part}: the last of build/logs/{part}.log =====", *lines[-SHOWN:], sep="\n")
    print(f"\nFAILED: {', '.join(failed)}" if failed else "\nall passed", flush=True)
    return 1 if failed else 0


def log(part: str) -> Path:
    return LOGS / f"{part}.log"


def start(part: str) -> subprocess.Popen[bytes]:
    """Start a part in its own process group, so that everything it starts can be stopped."""
    command = [os.environ.get("MAKE", "make"), "--no-print-directory", part]
    with log(part).open("wb") as out:
        return subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )


def closing_lines(part: str) -> list[str]:
    """If a part runs pytest, pytest's last line of each run; otherwise the last line of the log."""
    lines = [line for line in log(part).read_text(errors="replace").splitlines() if line.strip()]
    counts = [line for line in lines if CLOSING.match(line)]
    return counts or lines[-1:]


def interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def stop(running: dict[str, subprocess.Popen[bytes]]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        for process in running.values():
            if process.poll() is None:
                os.killpg(process.pid, number)
        until = time.monotonic() + PATIENCE
        while any(process.poll() is None for process in running.values()) and time.monotonic() < until:
            time.sleep(0.1)
    for process in running.values():
        with suppress(ProcessLookupError):  # processes that a part has left behind; usually there are none
            os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
