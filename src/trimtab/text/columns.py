"""Maps the columns of a user's table to the parts of a pair, and decides which other columns can be ignored."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unicodedata import category

from trimtab.errors import TrimtabError

ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "instruction", "input", "user", "messages", "conversations"),
    "question": ("prompt",),
    "positive": ("chosen", "matching", "pos", "preferred_output"),
    "negative": ("rejected", "not_matching", "neg", "non_preferred_output"),
    "statement": ("text", "completion"),
    "system": ("system_prompt", "system_message"),
    "positive_system": ("positive_system_prompt",),
    "negative_system": ("negative_system_prompt",),
    "answer": ("output", "completion", "response"),
}
"""Other common names of the parts of a pair, and of an example."""

CONTEXTS = frozenset(
    {"context", "context_string", "passage", "document", "article", "story", "choices", "options", "history", "input"}
    | {"tools", "functions", "image", "images", "audio"}
)
"""Columns that are part of the prompt, if they aren't empty."""
PROMPT_COLUMNS = CONTEXTS | {"system", *ALIASES["system"], "positive_system", "negative_system"}
"""The same, plus system prompts, for readers that don't support them."""

CHOICE_COLUMNS = (
    "label",
    "labels",
    "preference",
    "preferred",
    "winner",
    "better",
    "choice",
    "answer",
    "correct",
    "target",
)
"""Columns whose number may say which side of a pair is the wanted one."""

BOOKKEEPING = frozenset(
    {"id", "idx", "index", "key", "uid", "uuid", "guid", "row", "source", "dataset", "split", "category", "categories"}
    | {"topic", "type", "tag", "tags", "metadata", "meta", "kwargs", "instruction_id_list", "url", "license", "lang"}
    | {"language", "model", "timestamp", "created_at"}
)
"""Columns about a row that can be ignored. The same goes for columns with numbers, and names that end in `_id`."""


NANS = frozenset({"nan", "NaN", "<NA>", "#N/A"})
"""An empty cell as pandas and spreadsheets write it."""

SIDES = frozenset({"-1", "0", "1", "2", "0.0", "1.0", "2.0", "true", "false"})
"""Values that are used to name sides."""


@dataclass(frozen=True)
class Columns:
    """The user's settings for a table's columns.

    `keys` names the column of a part, such as `{"positive": "answer_a"}`; any other part is looked up by its own name
    and then by its `ALIASES`. `ignore` names columns to leave out.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    ignore: frozenset[str] = frozenset()

    @classmethod
    def of(cls, parts: Collection[str], keys: Mapping[str, str] | None, ignore: Iterable[str]) -> Columns:
        """Raises `TrimtabError` for a key that isn't one of the `parts`, and if `ignore` is a string, not a list."""
        if isinstance(ignore, str):
            raise TrimtabError(f"columns to ignore must be a list, such as [{ignore!r}]")
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
        """Raises `TrimtabError` if a column in `keys` isn't in any row."""
        there = list(dict.fromkeys(key for row in rows if isinstance(row, Mapping) for key in row))
        for part, column in self.keys.items():
            if there and column not in there:
                raise TrimtabError(
                    f"{name} has no column {column!r}, which was given as {part!r}; its columns are {_listed(there)}"
                )


@dataclass
class Row:
    """One row while its parts are being read: the parts, the names of their columns, and the remaining columns."""

    parts: dict[str, Any]
    names: dict[str, str]
    remaining: dict[str, Any]

    @classmethod
    def of(cls, row: Mapping[str, Any], columns: Columns) -> Row:
        """The row with the columns in `keys` read, and those in `ignore` left out."""
        named = {part: column for part, column in columns.keys.items() if column in row}
        used = {*named.values(), *columns.ignore}
        remaining = {str(key): value for key, value in row.items() if key not in used}
        return cls({part: row[column] for part, column in named.items()}, named, remaining)

    def has(self, part: str) -> bool:
        """Whether the part exists, under its own name or an alias; it may be empty."""
        return part in self.parts or bool(self._columns(part))

    def take(self, part: str, where: str) -> None:
        """Find the part, if it exists. Raises `TrimtabError` if several columns could be it."""
        if part in self.parts:
            return
        candidates = self._columns(part)
        filled = [name for name in candidates if not is_blank(self.remaining[name])]
        if len(filled) > 1 and filled[0] != part:
            raise TrimtabError(
                f"{where}: {' and '.join(map(repr, filled))} could each be the {part}; write it into one column, or say"
                f" which one it is (--keys {part}={filled[0]}), and leave the rest out (--ignore"
                f" {','.join(filled[1:])})"
            )
        if candidates:
            name = filled[0] if filled else candidates[0]
            self.parts[part], self.names[part] = self.remaining.pop(name), name

    def _columns(self, part: str) -> list[str]:
        """The columns that may be the part: first by its own name, then by its `ALIASES`."""
        return columns_of(self.remaining, (part, *ALIASES.get(part, ())))

    def name(self, part: str) -> str:
        """The name of the part's column, for an error."""
        return self.names.get(part, part)

    def check_rest(self, where: str) -> None:
        """Raises `TrimtabError`, naming them, if there are remaining columns that may matter."""
        read = list(self.parts.values())
        if unused := [name for name, value in self.remaining.items() if _matters(name, value, read)]:
            part = "PART" if "prompt" in self.parts or "question" in self.parts else "prompt"
            fix = f"say which part of a pair it is (--keys {part}={unused[0]})"
            if isinstance(self.remaining[unused[0]], Mapping):
                fix = "write the part that belongs to the pair into a separate column"
            raise TrimtabError(
                f"{where}: {_listed(unused)} would be ignored, but may matter; {fix}, or leave it out"
                f" (--ignore {','.join(unused)})"
            )


def plain_name(name: str) -> str:
    """A column's name for comparison: `Answer Matching-Behavior` and `answerMatchingBehavior` are equal."""
    return re.sub(r"[\s-]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name).strip())).lower()


def columns_of(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The row's columns with these names, in the order of the names, compared in normalized form."""
    return list(_columns_of(tuple(row), tuple(names)))


@lru_cache(maxsize=1024)
def _columns_of(columns: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """Cached, since all rows of a file have the same columns."""
    by_name: dict[str, list[str]] = {}
    for column in columns:
        by_name.setdefault(plain_name(column), []).append(column)
    return tuple(
        column for name in names for column in sorted(by_name.get(name, ()), key=lambda column: column != name)
    )


def unused_prompt_columns(row: Mapping[str, Any], read: Any) -> list[str]:
    """The columns that belong to the prompt by their names and contain something that isn't in `read`."""
    text = read if isinstance(read, str) else json.dumps(read, ensure_ascii=False)
    unused = []
    for name in columns_of(row, tuple(sorted(PROMPT_COLUMNS))):
        cells = row[name] if isinstance(row[name], list) else [row[name]]
        if not is_blank(row[name]) and not all(isinstance(cell, str) and cell.strip() in text for cell in cells):
            unused.append(name)
    return unused


def check_choice_columns(rows: Iterable[Any], columns: Columns, name: str) -> None:
    """Raises `TrimtabError` for a column that may say which side is the wanted one, since here the side's column says
    it.

    These are columns in `CHOICE_COLUMNS` whose values are all in `SIDES`, and differ between rows.
    """
    values: dict[str, set[str]] = {}
    for row in rows:
        for column in columns_of(row, CHOICE_COLUMNS) if isinstance(row, Mapping) else ():
            value = row[column]
            if column not in columns.ignore and (isinstance(value, (bool, int)) or _is_number(str(value))):
                values.setdefault(column, set()).add(str(value).lower())
    used = set(columns.keys.values())
    if chosen := [
        column for column, numbers in values.items() if len(numbers) > 1 and numbers <= SIDES and column not in used
    ]:
        raise TrimtabError(
            f"{name}: {chosen[0]!r} differs from row to row, and may say which side is the wanted one; here that is"
            f" always the positive side. Swap the sides where it isn't, or leave the column out"
            f" (--ignore {chosen[0]})"
        )


def is_blank(value: Any) -> bool:
    """Whether a cell is empty: `None`, NaN, invisible characters only, or an empty list or mapping."""
    if isinstance(value, str):
        return is_nan(value) or all(letter.isspace() or category(letter) in ("Cf", "Cc") for letter in value)
    return value is None or is_nan(value) or (isinstance(value, (list, tuple, dict)) and not value)


def is_nan(value: Any) -> bool:
    """Whether the value is NaN, as a number or as text; pandas represents empty cells so."""
    return value in NANS if isinstance(value, str) else isinstance(value, float) and math.isnan(value)


def _matters(name: str, value: Any, read: Sequence[Any]) -> bool:
    """Whether leaving the column out may lose something that should be learned from."""
    known = plain_name(name)
    if is_blank(value):
        return False
    if known in BOOKKEEPING or known.endswith(("_id", "_model")):
        return isinstance(value, Mapping) and any(columns_of(value, (part, *more)) for part, more in ALIASES.items())
    if isinstance(value, str):
        if _is_number(value) or any(_contains_text(cell, value.strip()) for cell in read):
            return False
        return value.strip().lower() not in ("true", "false")
    if isinstance(value, (list, tuple)) and all(isinstance(cell, (int, float)) for cell in value):
        return False
    return isinstance(value, (list, tuple, dict)) and value not in read


def _contains_text(cell: Any, text: str) -> bool:
    """Whether a cell that was read contains the text; texts of one or two letters must match as a whole."""
    return isinstance(cell, str) and text in cell and (len(text) > 2 or text == cell.strip(" ()"))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
