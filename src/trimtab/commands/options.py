"""Groups of options for several commands: the fields of a dataclass, which the command gets as one argument.

@dataclass(frozen=True)
class Where:
    host: Annotated[str, typer.Option(help="The address.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="The port.")] = 8000

@grouped
def ping(name: str, where: Where) -> None:      # ping NAME --host … --port …
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import typer

from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import check_target

Group = TypeVar("Group")


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command for typer: each parameter that is a group is replaced by the options of the group."""
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if isinstance(kind, type) and is_dataclass(kind):
            groups[parameter.name] = kind
            parameters += parameters_of(kind)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind))

    @wraps(command)
    def run(**kwargs: Any) -> None:
        group_values = {name: pop_group(kind, kwargs) for name, kind in groups.items()}
        command(**kwargs, **group_values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def parameters_of(group: type) -> list[inspect.Parameter]:
    """The options of a group as parameters."""
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(group)
    ]


def check_picture(path: Path | None, suffix: str = ".png") -> None:
    """Raise `TrimtabError` if a requested plot, or page of plots, can't be drawn or written."""
    if path is not None:
        from trimtab.report.plots import check_matplotlib

        check_target(path, suffix)
        check_matplotlib()


def numbers_of(text: str, option: str, example: str) -> list[float]:
    """Parse the numbers of an option such as 0.5,1. Raises `TrimtabError`, with the example, for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise TrimtabError(f"{option} {text!r} isn't a list of numbers; write {example}") from None


def standalone_command(name: str, function: Callable[..., Any]) -> Any:
    """Make a separate command of a function, for another command to pass its arguments to."""
    app = typer.Typer(rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False)
    app.command(name=name, context_settings={"help_option_names": ["-h", "--help"]})(function)
    return typer.main.get_command(app)


def pop_group(group: type[Group], kwargs: dict[str, Any]) -> Group:
    """The group with the values of its options, which are removed from `kwargs`."""
    return group(**{f.name: kwargs.pop(f.name) for f in fields(group)})  # type: ignore[arg-type]
