"""The page on positions prints what it says, and names every rule."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trimtab.steering import Positions
from trimtab.steering.grammar import FORMS

PAGE = (Path(__file__).parents[1] / "docs" / "positions.md").read_text()


@pytest.mark.real
@pytest.mark.long
def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/positions.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == shown


def test_every_rule_is_there() -> None:
    table = PAGE.partition("They combine")[0]
    for form in FORMS:
        assert f"`{form}`" in table, form


def test_what_is_written_is_read() -> None:
    for rule in ("thinking & ~first:20", r'(prompt | answer) & ~at:"\n"', "answer | at:</think>", "prompt | thinking"):
        assert f"`{rule}`" in PAGE
        assert Positions.parse(rule).meanings
