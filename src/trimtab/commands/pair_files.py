"""The options that map the columns of a file of pairs, and reading the file with them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from trimtab.errors import TrimtabError
from trimtab.text.columns import Columns
from trimtab.text.pairs import KEYS, Pair, pairs_from_text, read_pairs_with

PANEL = "Columns of pairs"

KeysOption = Annotated[
    str | None,
    typer.Option(
        help="The columns of the pairs, if they have other names: prompt=q,positive=good,negative=bad.",
        metavar="PART=COLUMN,…",
        rich_help_panel=PANEL,
    ),
]
IgnoreOption = Annotated[
    str | None,
    typer.Option(
        help="Columns of the pairs to leave out. By default, a column that isn't read but may matter is an error.",
        metavar="COLUMN,…",
        rich_help_panel=PANEL,
    ),
]


@dataclass(frozen=True)
class ColumnOptions:
    """The mapping of the columns of a file of pairs."""

    keys: KeysOption = None
    ignore: IgnoreOption = None

    def to_columns(self, *, pairs: bool, source: str = "--pairs") -> Columns:
        """The parsed mapping. Raises `TrimtabError` if it is malformed, or if there are no `pairs` to apply it to."""
        for name, value in (("--keys", self.keys), ("--ignore", self.ignore)):
            if value is not None and not pairs:
                raise TrimtabError(f"{name} applies to the columns of pairs; give {source} FILE")
        return Columns.parse(KEYS, self.keys, self.ignore)

    def read(self, path: str | Path | None) -> list[Pair]:
        """Read the pairs with this mapping; empty without a path. Raises `TrimtabError` like `read_pairs`."""
        return load_pairs(path, self.to_columns(pairs=path is not None))


def load_pairs(path: str | Path | None, columns: Columns) -> list[Pair]:
    """Read the pairs of a file (`-`: standard input); empty without a path. Raises `TrimtabError` like `read_pairs`."""
    if str(path) == "-":
        return pairs_from_text(sys.stdin.read(), "standard input", columns)
    return [] if path is None else read_pairs_with(path, columns)
