"""Groups of options: a command with them has just the options, and gets each group as one value."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from click.testing import CliRunner

from trimtab.commands.options import grouped, parameters_of, pop_group

GOT: list[Any] = []


@dataclass(frozen=True)
class Where:
    """A group."""

    host: Annotated[str, typer.Option(help="The address.")] = "here"
    port: Annotated[int, typer.Option("--port", "-p", min=1, help="The port.")] = 80


@dataclass(frozen=True)
class Further(Where):
    """A group with one more."""

    tags: Annotated[list[str] | None, typer.Option(help="Tags.")] = None


@grouped
def ping(
    name: Annotated[str, typer.Argument(help="Who.")],
    *,
    where: Further,
    times: Annotated[int, typer.Option(help="How often.")] = 1,
) -> None:
    """Ping somebody."""
    GOT.append((name, where, times))


@pytest.fixture
def run() -> Any:
    app = typer.Typer(add_completion=False)
    app.command()(ping)
    command = typer.main.get_command(app)
    GOT.clear()
    return lambda *words: CliRunner().invoke(command, list(words))


def test_a_group_arrives_as_one_value(run: Any) -> None:
    assert run("ann").exit_code == 0
    assert run("bob", "--host", "there", "-p", "8", "--tags", "a", "--tags", "b", "--times", "3").exit_code == 0
    assert [("ann", Further(), 1), ("bob", Further("there", 8, ["a", "b"]), 3)] == GOT


def test_help_and_checks_are_those_of_single_options(run: Any) -> None:
    shown = run("--help").output
    for words in ("Ping somebody.", "The address.", "The port.", "Tags.", "How often."):
        assert words in shown
    assert run("ann", "--port", "0").exit_code == 2
    assert run("ann", "--where", "x").exit_code == 2
    assert GOT == []


def test_options_stand_where_the_group_does() -> None:
    assert list(inspect.signature(ping).parameters) == ["name", "host", "port", "tags", "times"]
    assert [p.default for p in parameters_of(Where)] == ["here", 80]


def test_what_is_taken_is_gone() -> None:
    values = {"host": "a", "port": 1, "other": 2}
    assert pop_group(Where, values) == Where("a", 1)
    assert values == {"other": 2}
