"""Which column of somebody's table is which part of a pair, and which columns nothing is lost without."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import TrimtabError

ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "instruction", "input", "user", "messages"),
    "positive": ("chosen", "matching"),
    "negative": ("rejected", "not_matching"),
}
"""What the parts of a pair are called elsewhere."""

BOOKKEEPING = frozenset(
    {"id", "idx", "index", "key", "uid", "uuid", "guid", "row", "source", "dataset", "split", "category", "categories"}
    | {"topic", "type", "tag", "tags", "metadata", "meta", "kwargs", "instruction_id_list", "url", "license", "lang"}
    | {"language", "model", "timestamp", "created_at"}
)
"""Columns about a row, without which nothing is lost. So are those with numbers, and with names that end in `_id`."""


@dataclass(frozen=True)
class Columns:
    """What a person says of a table's columns.

    `keys` names the column of a part, such as `{"positive": "answer_a"}`; a part without one is looked for by its own
    name and then by its `ALIASES`. `ignore` names columns that are to be left out.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    ignore: frozenset[str] = frozenset()

    @classmethod
    def of(cls, parts: Collection[str], keys: Mapping[str, str] | None, ignore: Iterable[str]) -> Columns:
        """Raises `TrimtabError` for a key that isn't one of the `parts`, and a text where columns should be."""
        if isinstance(ignore, str):
            raise TrimtabError(f"columns to ignore come as a list, such as [{ignore!r}]")
        for part in keys or {}:
            if part not in parts:
                raise TrimtabError(f"no part of a pair is called {part!r}; parts are {', '.join(parts)}")
        return cls(dict(keys or {}), frozenset(ignore))

    @classmethod
    def parse(cls, parts: Collection[str], keys: str | None, ignore: str | None) -> Columns:
        """From the command line: `positive=a,negative=b`, and `a,b`. Raises `TrimtabError` for anything else."""
        named: dict[str, str] = {}
        for entry in (keys or "").split(",") if keys is not None else []:
            part, equals, column = (piece.strip() for piece in entry.partition("="))
            if not equals or not part or not column:
                raise TrimtabError(f"--keys {keys!r} can't be read at {entry!r}; write positive=COLUMN,negative=COLUMN")
            if part in named:
                raise TrimtabError(f"--keys {keys!r} names a column for {part!r} twice")
            named[part] = column
        left_out = [name.strip() for name in ignore.split(",")] if ignore is not None else []
        if not all(left_out):
            raise TrimtabError(f"--ignore {ignore!r} can't be read; write COLUMN,COLUMN")
        return cls.of(parts, named, left_out)

    def check(self, rows: Sequence[Any], name: str) -> None:
        """Raises `TrimtabError` for a column that was named and is in no row."""
        there = list(dict.fromkeys(key for row in rows if isinstance(row, Mapping) for key in row))
        for part, column in self.keys.items():
            if there and column not in there:
                raise TrimtabError(
                    f"{name} has no column {column!r}, which was to be {part!r}; its columns are {_listed(there)}"
                )


@dataclass
class Row:
    """One row while its parts are being read: the parts, their columns' names, and the columns that are left."""

    parts: dict[str, Any]
    names: dict[str, str]
    left: dict[str, Any]

    @classmethod
    def of(cls, row: Mapping[str, Any], columns: Columns) -> Row:
        """The row with the named columns read, and those to be ignored left out."""
        named = {part: column for part, column in columns.keys.items() if column in row}
        taken = {*named.values(), *columns.ignore}
        left = {key: value for key, value in row.items() if key not in taken}
        return cls({part: row[column] for part, column in named.items()}, named, left)

    def has(self, part: str) -> bool:
        """Whether the part is there, under its own name or another; it may be empty."""
        return part in self.parts or any(name in self.left for name in _names(part))

    def take(self, part: str, where: str) -> None:
        """Find the part, if it is there. Raises `TrimtabError` where several columns could be it."""
        if part in self.parts:
            return
        there = [name for name in _names(part) if name in self.left]
        said = [name for name in there if not is_blank(self.left[name])]
        if len(said) > 1 and said[0] != part:
            raise TrimtabError(
                f"{where}: {' and '.join(map(repr, said))} could each be the {part}; say which one is"
                f" (--keys {part}={said[0]}), and leave the rest out (--ignore {','.join(said[1:])})"
            )
        if there:
            name = said[0] if said else there[0]
            self.parts[part], self.names[part] = self.left.pop(name), name

    def name(self, part: str) -> str:
        """What the part's column is called, for an error."""
        return self.names.get(part, part)

    def check_rest(self, where: str) -> None:
        """Raises `TrimtabError`, naming them, where columns are left that may matter."""
        read = list(self.parts.values())
        if lost := [name for name, value in self.left.items() if _matters(name, value, read)]:
            raise TrimtabError(
                f"{where}: nothing is read of {_listed(lost)}, and it may matter; say which part of a pair it is"
                f" (--keys prompt={lost[0]}), or leave it out (--ignore {','.join(lost)})"
            )


def is_blank(value: Any) -> bool:
    """Whether a cell says nothing: none, NaN, white space, or a list of nothing."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or is_nan(value) or (isinstance(value, (list, tuple, dict)) and not value)


def is_nan(value: Any) -> bool:
    """Whether it is NaN, which is what pandas makes of an empty cell."""
    return isinstance(value, float) and math.isnan(value)


def _names(part: str) -> tuple[str, ...]:
    return (part, *ALIASES.get(part, ()))


def _matters(name: str, value: Any, read: Sequence[Any]) -> bool:
    """Whether leaving it out may lose something that should be learned from."""
    known = name.strip().lower()
    if is_blank(value) or known in BOOKKEEPING or known.endswith("_id"):
        return False
    if isinstance(value, str):
        if _is_number(value) or any(isinstance(cell, str) and value.strip() in cell for cell in read):
            return False
        return value.strip().lower() not in ("true", "false")
    return isinstance(value, (list, tuple, dict)) and value not in read


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
