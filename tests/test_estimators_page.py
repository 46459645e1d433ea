"""The page on estimators: its table has all of them, and its example prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trimtab.learn.estimators import ESTIMATORS

PAGE = (Path(__file__).parents[1] / "docs" / "estimators.md").read_text()


def test_the_table_has_all_that_have_a_name() -> None:
    assert re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE) == list(ESTIMATORS)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/estimators.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == shown
