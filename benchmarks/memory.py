"""Peak memory, each case in its own process, since within one process the peak only grows."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def peak_of(*arguments: str) -> float:
    """The peak memory in MiB that `python -m benchmarks peak …` prints, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks", "peak", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def forget_peak() -> None:
    """Reset the peak, if the system supports it (Linux), so that loading a model doesn't hide the memory of a run."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")


def own_peak() -> float:
    """The peak resident memory of this process in MiB, since `forget_peak` if the system supports that.

    On Linux it is read from `/proc`, since `ru_maxrss` starts from the parent process's value there.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)
