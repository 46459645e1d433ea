"""Make an environment from its lock, unless it is already up to date.

    python tools/environment.py main .venv

The inputs of an environment (its locks, the Python version, whether there is an NVIDIA GPU) are hashed, and the hash is
written into it last, as `made-of`. So an environment whose installation was interrupted is made again, and one whose
lock hasn't changed costs nothing. This needs only the standard library and the pip that comes with Python.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYPROJECT = "pyproject.toml"
TORCH = "constraints-cpu.txt"
BUILD = "requirements/build.lock"
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
# Packages that vLLM requires, but that are in no lock and not needed in environments for CPUs.
LEFT_OUT = re.compile(r"requires (torchvision|torchaudio|torchcodec)\b.* not installed")


@dataclass(frozen=True)
class Recipe:
    """The inputs of an environment."""

    lock: str | None = None  # None: the newest versions, ignoring pyproject.toml's upper bounds
    overlay: bool = False  # a folder to put on top of the main environment, not a separate environment
    gpu: bool = False  # whether it uses a CUDA build of torch if there is a GPU
    torch: bool = False  # whether its lock has only torch: without hashes, which differ between builds
    python: tuple[int, int] = (3, 10)


RECIPES = {
    "main": Recipe("requirements/dev.lock", gpu=True),
    "peers": Recipe("requirements/peers.lock", overlay=True),
    "oldest-transformers": Recipe("requirements/oldest-transformers.lock", overlay=True),
    "newest-torch": Recipe("requirements/newest-torch.txt", overlay=True, gpu=True, torch=True),
    "vllm": Recipe("requirements/vllm.lock", python=(3, 11)),
    "vllm-oldest": Recipe("requirements/vllm-oldest.lock"),
    "upgraded": Recipe(gpu=True),
}


def base(gpu: bool) -> str:
    """Properties that an environment can't be updated across: the Python version, and the kind of torch build."""
    return f"{sys.implementation.cache_tag} {sys.platform} {'cuda' if gpu else 'cpu'}"


def ingredients(recipe: Recipe) -> str:
    """The hash of the files that determine the contents of an environment."""
    digest = hashlib.sha256()
    for name in [recipe.lock] if recipe.overlay else [PYPROJECT, TORCH, BUILD, recipe.lock]:
        digest.update((ROOT / name).read_bytes() if name else b"")
    return digest.hexdigest()


def pip(python: Path, *arguments: str | Path, quiet: bool = False) -> int:
    command: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    return subprocess.run(command, stderr=subprocess.DEVNULL if quiet else None).returncode


def install(python: Path, *arguments: str | Path) -> None:
    """Install without compiling: Python compiles modules on import, and only a small part of them is ever imported."""
    if pip(python, "install", "-qq", "--no-compile", *arguments):
        sys.exit(f"pip could not install into {python.parents[1]}")


def install_torch(python: Path, gpu: bool, *wanted: str | Path) -> None:
    """Install torch, which is in no lock.

    On a CPU, try the small CPU build from PyTorch's own index first, then pip's configured index.
    """
    flags = ("-qq", "--no-compile", "--retries", "0", "--index-url", CPU_TORCH)
    if gpu or pip(python, "install", *flags, *wanted, quiet=True):
        install(python, *wanted)


def check(python: Path) -> None:
    """Exit if a package lacks one of its requirements: an incomplete lock must not go unnoticed."""
    done = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True)
    wrong = [line for line in done.stdout.splitlines() if not LEFT_OUT.search(line)]
    if done.returncode and wrong:
        advice = f"{python.parents[1]} isn't whole. If it has packages of your own, remove it and try again."
        sys.exit("\n".join([*wrong, advice]))


def install_upgraded(python: Path) -> None:
    """Install the newest version of everything, without pyproject.toml's upper bounds."""
    listed: list[str | Path] = [python, ROOT / "tools/upgraded.py", "requirements"]
    wanted = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.splitlines()
    install(python, "--upgrade", "--upgrade-strategy", "eager", "-c", ROOT / TORCH, *wanted)


def make(name: str, path: Path) -> None:
    recipe = RECIPES[name]
    if sys.version_info[:2] < recipe.python:
        sys.exit(f"{name} needs Python {'.'.join(map(str, recipe.python))}, and this is {sys.version.split()[0]}")
    gpu = recipe.gpu and shutil.which("nvidia-smi") is not None
    mark, python = path / "made-of", path / "bin/python"
    wanted = f"{base(gpu)} {ingredients(recipe)}"
    had = mark.read_text() if mark.exists() else None  # None also if it isn't ours: then nothing is removed
    if had == wanted and recipe.lock is not None:
        return
    if had is not None and (recipe.overlay or not had.startswith(base(gpu))):  # including those marked "unfinished"
        shutil.rmtree(path)
    if recipe.overlay:
        path.mkdir(parents=True, exist_ok=True)
        mark.write_text("unfinished")
        there = ("--upgrade", "--target", path, "-r", ROOT / str(recipe.lock))
        if recipe.torch:
            install_torch(Path(sys.executable), gpu, *there)
        else:
            install(Path(sys.executable), "--no-deps", "--require-hashes", *there)
    else:
        print(f"installing into {path}: a few minutes the first time", flush=True)
        if not python.exists():
            # the current executable may just have been removed
            itself = getattr(sys, "_base_executable", sys.executable)
            subprocess.run([itself, "-m", "venv", path], check=True)
        mark.write_text("unfinished")
        locked = ("--no-deps", "--require-hashes", "--no-build-isolation", "-r")
        install_torch(python, gpu, "-r", ROOT / TORCH)
        install(python, *locked, ROOT / BUILD)
        if recipe.lock is None:
            install_upgraded(python)
        else:
            install(python, *locked, ROOT / recipe.lock)
        install(python, "--no-deps", "--no-build-isolation", "--editable", ROOT)
        check(python)
    mark.write_text(wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make an environment from its lock, unless it is there.")
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args()
    path = arguments.path.resolve()
    turn = ROOT / "build" / f"{arguments.name}.lock"
    turn.parent.mkdir(exist_ok=True)
    with turn.open("w") as file:  # with two concurrent runs, the second waits and finds the environment made
        fcntl.flock(file, fcntl.LOCK_EX)
        make(arguments.name, path)


if __name__ == "__main__":
    main()
