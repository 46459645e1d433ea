"""What all tests share: which cases are long, the default model, and the command line run in this process."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Test workers run side by side: threads that wait for a core that another worker holds cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--families", help="run cases of these families of models only, with commas between; cases of none of them stay"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as `long` what `long_unless` doesn't hold for, before `-m` chooses; then choose by `--families`."""
    for item in items:
        values = parameters(item)
        for mark in item.iter_markers("long_unless"):
            (which,) = mark.args
            names = inspect.signature(which).parameters
            if all(name in values for name in names) and not which(*(values[name] for name in names)):
                item.add_marker("long")
    if config.getoption("--families"):
        wanted = {*config.getoption("--families").split(","), None}
        config.hook.pytest_deselected(items=[item for item in items if family(item) not in wanted])
        items[:] = [item for item in items if family(item) in wanted]


def parameters(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params


def family(item: pytest.Item) -> str | None:
    """The family of tiny models that a case is about, where it is about one."""
    from tiny import FAMILIES

    for value in parameters(item).values():
        first = value[0] if isinstance(value, tuple) and value else value
        if isinstance(first, str) and first in FAMILIES:
            return first
    return None


@pytest.fixture(scope="session")
def lm() -> Any:
    """The default model in float32. Tests that use it are marked `real`."""
    from trimtab.lm import LM

    return LM.load(dtype="float32")


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def trimtab(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `trimtab …` in this process."""
    from trimtab.commands import main

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return run
