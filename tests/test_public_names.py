"""What is named at the top of the package: every method's function, and what `LM.load` gives, engine by engine."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import trimtab
from trimtab.engines import ENGINES
from trimtab.methods.recipe import recipes


@pytest.mark.parametrize("recipe", recipes().values(), ids=lambda recipe: recipe.name)
def test_every_method_can_be_had_from_the_top(recipe: Any) -> None:
    assert getattr(trimtab, recipe.function.partition(":")[2]) is recipe.load()
    assert recipe.function.partition(":")[2] in trimtab.__all__


def test_the_package_waits_for_nothing_heavy() -> None:
    program = (
        "import sys, trimtab; dir(trimtab); print({'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "set()\n"), ran.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="overloads are looked up by what Python 3.11 has")
def test_an_editor_knows_what_is_loaded() -> None:
    from typing import get_overloads

    known = {}
    for overload in get_overloads(trimtab.LM.load):
        engine, made = overload.__annotations__["engine"], overload.__annotations__["return"]
        known[engine] = made
    named = {f"Literal['{name}']": made.partition(":")[2] for name, made in ENGINES.items()}
    assert known == {"Literal['transformers']": "LM", **named, "str": "Any"}
