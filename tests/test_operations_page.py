"""The page on operations prints what it says, and names every operation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trimtab.steering.operations import OPERATIONS

PAGE = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()


@pytest.mark.real
def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/operations.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == shown


def test_every_operation_is_there() -> None:
    for operation in OPERATIONS.values():
        assert f"`{operation.__name__}(" in PAGE, operation
