"""The examples in docstrings print what they say."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

MODULES = (
    "trimtab.files.pick",
    "trimtab.steering.operations",
    "trimtab.steering.positions",
    "trimtab.steering.steering",
    "trimtab.text.pairs",
)
SOURCE = Path(__file__).parents[1] / "src"


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_print_what_they_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, attempted = doctest.testmod(import_module(name))
    assert attempted
    assert not failed


def test_every_module_with_examples_is_tested() -> None:
    written = {path for path in SOURCE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8")}
    assert written == {SOURCE / f"{name.replace('.', '/')}.py" for name in MODULES}
