"""Options from the environment and from a TOML file, for a command with many options."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from trimtab.errors import TrimtabError
from trimtab.text.text_files import read_text


class FromEnvironment(TyperCommand):
    """A command whose options can all be set in the environment; its help says so once, not for each option."""

    def __init__(self, *arguments: Any, **kwargs: Any) -> None:
        super().__init__(*arguments, **kwargs)
        for parameter in self.params:
            if hasattr(parameter, "show_envvar"):
                parameter.show_envvar = False


def read_config(path: Path) -> dict[str, Any]:
    """The keys and values of a TOML file.

    Raises:
        TrimtabError: The file doesn't exist or isn't TOML, or this Python can't read TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise TrimtabError(f"reading {path} needs tomli on this Python: pip install tomli") from error
    try:
        return tomllib.loads(read_text(path))
    except TrimtabError as error:
        raise TrimtabError(f"--config: {error}") from None
    except tomllib.TOMLDecodeError as error:
        hint = "; JSON and YAML aren't supported" if path.suffix in (".json", ".yaml", ".yml") else ""
        raise TrimtabError(f"--config {path} isn't TOML: {error}{hint}") from error


def _apply_config(context: typer.Context, _parameter: Any, path: Path | None) -> Path | None:
    """Use a file's values as the defaults of this command."""
    if path is None or context.resilient_parsing:
        return path
    written = read_config(path)
    values = {key.replace("-", "_"): value for key, value in written.items()}
    if len(values) < len(written):
        twice = next(key for key in written if "-" in key and key.replace("-", "_") in written)
        raise TrimtabError(f"--config {path}: {twice} is given twice, with hyphens and with underscores; keep one")
    known = {
        _key(parameter): parameter for parameter in context.command.params if parameter.param_type_name == "option"
    }
    for key, value in values.items():
        if isinstance(value, dict):
            raise TrimtabError(f"--config {path}: {key} is a table; options are written as key = value")
        if key not in known or known[key].name in ("config", "help"):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; do you mean {near[0]}?" if near else f"; trimtab {context.info_name} --help lists the options"
            raise TrimtabError(f"--config {path}: there is no option {key!r}{hint}")
        if getattr(known[key], "multiple", False) != isinstance(value, list):
            raise TrimtabError(f"--config {path}: {key} is {'a list' if known[key].multiple else 'one value'}")
    context.default_map = {str(known[key].name): value for key, value in values.items()}
    return path


def _key(option: Any) -> str:
    """The name of an option in a file: its long name, with underscores."""
    return max(option.opts, key=len).lstrip("-").replace("-", "_")


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A TOML file with these options: max-tokens = 256. The command line and the environment take precedence.",
        metavar="FILE",
        is_eager=True,
        callback=_apply_config,
    ),
]
