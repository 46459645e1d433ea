"""The tutorial on adding a method: each of its steps runs as printed and prints what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "add-a-method.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
STEPS = [(code, shown) for (kind, code), (after, shown) in pairwise(BLOCKS) if (kind, after) == ("python", "text")]
FILES = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
(TEST,) = [code for kind, code in BLOCKS if kind == "python" and "def test_" in code]
COMMANDS = [line.split() for kind, code in BLOCKS if kind == "sh" for line in code.splitlines()]
PAIRS = "prompt,positive,negative\n" + "".join(
    f"What is {what}?,I hate {what}.,I love {what}.\n" for what in ("rain", "the sea", "bread", "a cat")
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the page's package is installed in, by pip, without a network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name, text in FILES.items():
        (source / name).write_text(text)
    options = ["--quiet", "--no-index", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return target


@pytest.fixture
def package(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(installed))


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_the_steps_print_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(STEPS) == 3
    names: dict[str, Any] = {"__name__": "__main__"}
    for code, shown in STEPS:
        exec(compile(code, "docs/add-a-method.md", "exec"), names)
        assert capsys.readouterr().out == shown


@pytest.mark.real
@pytest.mark.usefixtures("package")
def test_the_commands_run(trimtab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.csv").write_text(PAIRS)
    assert len(COMMANDS) == 4
    shown = []
    for program, *arguments in COMMANDS:
        assert program == "trimtab"
        ran = trimtab(*arguments)
        assert ran.code == 0, ran.err
        shown.append(ran.out)
    assert "trimtab-without 0.1" in shown[0]
    assert "--share" in shown[1]
    assert "an example, of no paper" in shown[1]
    assert "ablate" in shown[3]


@pytest.mark.usefixtures("package")
def test_the_methods_own_test_passes() -> None:
    names: dict[str, Any] = {"__name__": "test_without"}
    exec(compile(TEST, "docs/add-a-method.md", "exec"), names)
    for family in names["test_without"].pytestmark[0].args[1]:
        names["test_without"](family)


def test_the_recipe_fits_its_function(package: None) -> None:
    import inspect

    from trimtab.methods.recipe import find_recipe

    recipe = find_recipe("without")
    assert recipe is not None
    parameters = inspect.signature(recipe.load()).parameters
    assert all(parameters[option.name].default == option.default for option in recipe.options)


def test_it_is_not_there_without_its_package() -> None:
    from trimtab.methods.recipe import recipes

    assert "without" not in recipes()
    assert set(FILES) == {"trimtab_without.py", "pyproject.toml"}


def test_links() -> None:
    for target in re.findall(r"\]\(([^)h#][^)#]*)", PAGE):
        assert (Path(__file__).parents[1] / "docs" / target).exists(), target
