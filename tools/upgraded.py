"""For `make test-upgraded`: trimtab's requirements without upper bounds, and the versions that changed.

python tools/upgraded.py requirements   # one per line, for pip
python tools/upgraded.py differences    # between the locks and the installed packages
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SKIPPED = {"vllm"}  # it has a separate environment, with the versions that its tests name


def unbounded(requirement: Requirement) -> Requirement:
    """The same requirement with only its lower bound; a version pinned with == becomes the lower bound."""
    floors = [f">={part.version}" for part in requirement.specifier if part.operator in (">=", "==", "~=")]
    requirement.specifier = SpecifierSet(",".join(floors))
    return requirement


def requirements() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in extras if name not in SKIPPED for line in extras[name])]
    for requirement in map(Requirement, lines):
        if requirement.name not in {project["name"], "torch"}:
            print(unbounded(requirement))


def differences() -> None:
    text = "".join((ROOT / "requirements" / name).read_text() for name in ("build.lock", "dev.lock"))
    pins = re.findall(r"(?m)^(\S+==[^\s\\]+(?: ; [^\\\n]+)?)", text)
    locked = {
        canonicalize_name(pin.name): str(pin.specifier)[2:]
        for pin in map(Requirement, pins)
        if not pin.marker or pin.marker.evaluate()
    }
    installed = {
        canonicalize_name(distribution.metadata["Name"]): distribution.version for distribution in distributions()
    }
    versions = {name: (locked.get(name), installed.get(name)) for name in sorted(locked.keys() | installed.keys())}
    for name, (before, after) in versions.items():
        if before != after and name not in {"pip", "torch", "trimtab"}:
            print(f"{name} {before or '(not in the lock)'} -> {after or '(not installed)'}")


if __name__ == "__main__":
    {"requirements": requirements, "differences": differences}[sys.argv[1]]()
