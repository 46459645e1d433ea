"""The page on agents prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("llguidance", reason="grammars need trimtab[serve]")

PAGE = (Path(__file__).parents[1] / "docs" / "agents.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.real
@pytest.mark.long
@pytest.mark.filterwarnings("ignore::trimtab.lm.DoseWarning")
def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(CODE[0], "docs/agents.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == shown


def test_the_others_are_python() -> None:
    for code in CODE:
        compile(code, "docs/agents.md", "exec")
    assert len(CODE) == 4
