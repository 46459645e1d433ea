"""The tutorial on adding a method runs as printed: its file is all that the command line needs, and its test passes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import trimtab.methods
from trimtab.methods.recipe import recipes

PAGE = (Path(__file__).parents[1] / "docs" / "add-a-method.md").read_text()
METHOD, TEST = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's file, where the methods are."""
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "median.py").write_text(METHOD)
    monkeypatch.setattr(trimtab.methods, "__path__", [*trimtab.methods.__path__, str(folder)])
    yield
    sys.modules.pop("trimtab.methods.median", None)


@pytest.mark.usefixtures("added")
def test_the_method_is_found_by_its_file() -> None:
    from trimtab.commands.learn_method import command_for

    shown = CliRunner().invoke(command_for(recipes()["median"]), ["--help"]).output
    assert "--unit" in shown
    assert "an example, of no paper" in shown


@pytest.mark.usefixtures("added")
def test_the_methods_own_test_passes() -> None:
    names: dict = {"__name__": "test_median"}
    exec(compile(TEST, "docs/add-a-method.md", "exec"), names)
    for family in names["test_median"].pytestmark[0].args[1]:
        names["test_median"](family)


def test_it_is_not_there_without_its_file() -> None:
    assert "median" not in recipes()
