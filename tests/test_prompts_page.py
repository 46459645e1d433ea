"""The page on prompts prints what it says, and names every column that is looked for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trimtab.commands.prompts import COLUMNS
from trimtab.text.columns import CONTEXTS

PAGE = (Path(__file__).parents[1] / "docs" / "prompts.md").read_text()


@pytest.mark.real
def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/prompts.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == shown


def test_every_column_is_there() -> None:
    for name in (*COLUMNS, *sorted(CONTEXTS), "system"):
        assert f"`{name}`" in PAGE, name
