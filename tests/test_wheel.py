"""The wheel: built twice it is the same to the byte, and it has what runs from it and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("hatchling", reason="the wheel is built by hatchling, which the locked environment has")


@pytest.mark.slow
def test_it_is_the_same_twice_and_whole(tmp_path: Path) -> None:
    built = []
    for name in ("one", "two"):
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
        command += ["--no-build-isolation", "-w", str(tmp_path / name), str(ROOT)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        built.append(next((tmp_path / name).glob("*.whl")))
    assert built[0].name == built[1].name
    assert built[0].read_bytes() == built[1].read_bytes()
    names = set(zipfile.ZipFile(built[0]).namelist())
    packaged = [
        path for path in (ROOT / "src" / "trimtab").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert {str(path.relative_to(ROOT / "src")) for path in packaged} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
