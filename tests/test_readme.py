"""The README's example runs as printed, and its links lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _run(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the example prints of each answer."""
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(folder)
    Path("example.py").write_text(code)
    runpy.run_path("example.py", run_name="__main__")
    unsteered, steered = capsys.readouterr().out.split("--- dose ")[1:]
    assert unsteered.split("\n")[0].strip("0.") == ""
    assert 0 < float(steered.split("\n")[0]) < 1
    assert unsteered.split("\n", 1)[1] != steered.split("\n", 1)[1]
    return [unsteered, steered]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.long
def test_a_prompt_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    unsteered, steered = _run(0, tmp_path, monkeypatch, capsys)
    assert "<<" not in unsteered
    assert "<<" in steered


@pytest.mark.real
def test_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, steered = _run(1, tmp_path, monkeypatch, capsys)
    assert steered.count("\n* ") + steered.count("\n- ") >= 2  # bullet points


def test_links_are_whole_addresses_of_what_is_there() -> None:
    """The README is read on PyPI too, where relative links lead nowhere."""
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    own = r"https://(?:github\.com/trimtab/trimtab/(?:blob|tree)|raw\.githubusercontent\.com/trimtab/trimtab)/main/([^#]*)"
    for link in links:
        assert link.startswith("https://"), link
        if match := re.match(own, link):
            assert (ROOT / match[1]).exists(), link


def test_every_method_has_a_page() -> None:
    from trimtab.methods.recipe import recipes

    for name in recipes():
        assert (ROOT / "docs" / "methods" / f"{name}.md").exists(), name
