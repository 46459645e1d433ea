"""The examples on these methods' pages print what the pages say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES_WITH_EXAMPLES = ("bipo", "cap", "distill", "instaboost", "loreft", "pasta", "reps", "seka", "steermoe", "sttp")
PAGES = Path(__file__).parents[1] / "docs" / "methods"


LONG = ("bipo", "cap", "distill", "instaboost", "loreft", "reps", "seka", "sttp")


@pytest.mark.real
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in PAGES_WITH_EXAMPLES]
)
def test_the_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (PAGES / f"{name}.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    exec(compile(code, f"docs/methods/{name}.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("name", PAGES_WITH_EXAMPLES)
def test_links(name: str) -> None:
    for target in re.findall(r"\]\(([^)h#][^)#]*)", (PAGES / f"{name}.md").read_text()):
        assert (PAGES / target).exists(), target
