"""The page on vectors that people have: its programs print what it says, and its commands run, one after the other."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "your-vector.md").read_text()
BLOCKS = re.findall(r"```(python|text|sh)\n(.*?)```", PAGE, re.DOTALL)
NEEDS_MODEL = "trimtab generate"


def steps(*, real: bool) -> Iterator[tuple[str, str]]:
    """The page's programs with what they print, and its commands; those that load a model only where that is wanted."""
    for i, (kind, code) in enumerate(BLOCKS):
        if kind == "python":
            following, shown = BLOCKS[i + 1]
            assert following == "text"
            yield code, shown
        elif kind == "sh":
            for line in code.splitlines():
                if real or not line.startswith(NEEDS_MODEL):
                    yield line, ""


def run(real: bool, trimtab: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "example"}
    for code, shown in steps(real=real):
        if shown:
            capsys.readouterr()
            exec(compile(code, "docs/your-vector.md", "exec"), names)
            assert capsys.readouterr().out == shown
        else:
            program, *arguments = shlex.split(code)
            assert program == "trimtab"
            done = trimtab(*arguments)
            assert done.code == 0, f"{code}: {done.err}"


@pytest.mark.filterwarnings("ignore::trimtab.files.foreign.FormatWarning")
def test_the_page(
    trimtab: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(False, trimtab, capsys)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_the_page_with_its_model(
    trimtab: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(True, trimtab, capsys)


def test_links() -> None:
    for target in re.findall(r"\]\(([^)h#][^)#]*)", PAGE):
        assert (Path(__file__).parents[1] / "docs" / target).exists(), target
