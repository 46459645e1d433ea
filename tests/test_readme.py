"""The README's example runs as printed, and its links lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.real
def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    Path("example.py").write_text(code)
    runpy.run_path("example.py", run_name="__main__")
    unsteered, steered = capsys.readouterr().out.split("--- dose ")[1:]
    assert unsteered.startswith("0.00\n")
    assert 0 < float(steered.split("\n")[0]) < 1
    assert unsteered.split("\n", 1)[1] != steered.split("\n", 1)[1]
    assert steered.count("\n* ") + steered.count("\n- ") >= 2  # bullet points


def test_links() -> None:
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / target).exists(), target


def test_every_method_has_a_page() -> None:
    from trimtab.methods.recipe import recipes

    for name in recipes():
        assert (ROOT / "docs" / "methods" / f"{name}.md").exists(), name
