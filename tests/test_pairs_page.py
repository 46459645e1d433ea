"""The page on pairs prints what it says, and names every key that is read of a row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trimtab.methods.recipe import recipes
from trimtab.text.answers import ReadAt
from trimtab.text.pairs import KEYS

PAGE = (Path(__file__).parents[1] / "docs" / "pairs.md").read_text()


@pytest.mark.real
@pytest.mark.filterwarnings("ignore::trimtab.methods.caa.PairsWarning")
def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/pairs.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == shown


def test_every_key_and_every_way_to_read_is_there() -> None:
    for key in KEYS:
        assert f"`{key}`" in PAGE, key
    said = re.findall(r"^\| `([a-z]+(?::[^`]+)?)` \|", PAGE.split("## Where an answer is read")[1], re.MULTILINE)
    assert [str(ReadAt.parse(rule)) for rule in said] == said == ["last", "answer", "first:8", "after:MARKER"]


def test_the_methods_that_take_a_shape_are_named_beside_it() -> None:
    rows = re.findall(r"^\| `([^|]*)` \| [^|]* \| (.*) \|$", PAGE.split("**System prompts.**")[0], re.MULTILINE)
    named = {keys: set(re.findall(r"`(\w+)`", methods)) for keys, methods in rows}
    shapes = {
        "answers": "prompt`, `positive`, `negative",
        "prompts": "prompt`, `prompt_without_instruction",
        "letters": "question`, `answer_matching_behavior`, `answer_not_matching_behavior",
    }
    for shape, keys in shapes.items():
        assert named[keys] == {name for name, recipe in recipes().items() if shape in recipe.shapes}, shape
