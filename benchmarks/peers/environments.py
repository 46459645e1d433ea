"""The peers' environments: one for each, made once with venv and pip in the user's cache directory."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Peer:
    """A package on the index, what else it needs to work, and the script in this folder that runs it."""

    name: str
    requirements: tuple[str, ...]
    script: str

    @property
    def version(self) -> str:
        return self.requirements[0].partition("==")[2]


# steering-vectors wants transformers below 5, repeng's release wants numpy below 2
OLDER = ("transformers==4.57.6", "numpy==1.26.4")
PEERS = (
    Peer("steering-vectors", ("steering-vectors==0.12.2", *OLDER), "run_steering_vectors.py"),
    Peer("repeng", ("repeng==0.4.0", *OLDER), "run_repeng.py"),
)


def cache() -> Path:
    """Where environments and converted folders are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab-benchmarks"


def python_of(peer: Peer) -> Path:
    """The interpreter of a peer's environment, which is made on first use, with the same torch as ours."""
    folder = cache() / f"{peer.name}-{peer.version}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / ".ready").exists():
        print(f"making an environment for {peer.name} {peer.version} in {folder} (once)", file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        torch = version("torch").partition("+")[0]
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for wanted in ((f"torch=={torch}",), peer.requirements):  # torch alone first, to choose its build
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True, stdout=sys.stderr)
        (folder / ".ready").touch()
    return python
