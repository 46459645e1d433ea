"""What all tests share: which cases are long, the default model, and the command line run in this process."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from chosen import family, is_long

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Test workers run side by side: threads that wait for a core that another worker holds cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--families", help="run cases of these families of models only, with commas between; cases of none of them stay"
    )
    parser.addoption("--load-seconds", type=float, default=60, help="how long the long test loads a server")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as `long` what `long_unless` doesn't hold for, before `-m` chooses; then choose by `--families`."""
    for item in items:
        if is_long(item):
            item.add_marker("long")
    if config.getoption("--families"):
        from tiny import FAMILIES

        wanted = {*config.getoption("--families").split(","), None}
        if unknown := wanted - {*FAMILIES, None}:
            raise pytest.UsageError(f"unknown families: {', '.join(map(str, unknown))}; known: {', '.join(FAMILIES)}")
        config.hook.pytest_deselected(items=[item for item in items if family(item) not in wanted])
        items[:] = [item for item in items if family(item) in wanted]


def pytest_collection_finish() -> None:
    """What has been imported and collected stays to the end: the garbage collector needn't walk over it (a tenth)."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let go of it: triton counts what is left of its objects when Python ends, and prints a page about leaks."""
    gc.unfreeze()


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


@pytest.fixture(scope="session", autouse=True)
def commands_made_once() -> Iterator[None]:
    """Typer makes all commands of their functions anew at each call, which takes longer than most tests of them."""
    import typer.main

    from trimtab.commands.app import app

    make = typer.main.get_command
    made = make(app)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", lambda instance: made if instance is app else make(instance))
        yield


@pytest.fixture
def trimtab(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `trimtab …` in this process."""
    from trimtab.commands import main

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return run
