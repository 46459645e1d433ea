"""The rows of a data file: JSONL, JSON, CSV, TSV, Parquet or Arrow."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.text.messages import is_turn
from trimtab.text.text_files import HINTS, kind_of, read_error, read_text

Rows = Iterator[tuple[str, Any]]
"""Rows with their locations: `file:line`, or `file: item 1` in a file without lines."""
COLUMNAR = (".parquet", ".arrow", ".feather")
"""Binary files, which are read with pyarrow."""
FORMATS = ".jsonl, .json, .csv, .tsv or .parquet"
SEPARATORS = (",", ";", "\t", "|")
CARD_KEYS = frozenset({"name", "description", "positive", "negative", "learn", "test"})
"""Keys of a trait card, which together are no columns of a table."""
SAYS_SEPARATOR = re.compile(r'"?sep=(.)"?')
"""The line before the header line with which Excel declares the separator."""


def read_rows(path: Path, default_suffix: str = "") -> Rows:
    """The rows of a file, in the format of its suffix, or of the suffix `default_suffix` if the file's is unknown.

    Raises `TrimtabError`, naming the file and the line, for a missing file, one of another kind, or a malformed row.
    """
    kind = kind_of(path)
    kind = kind if kind in READERS or kind in COLUMNAR or not default_suffix else default_suffix
    if kind in COLUMNAR:
        return _columnar(path, kind)
    if kind in READERS:
        return READERS[kind](path, read_text(path))
    if not path.is_file():
        raise read_error(path)
    fix = f"; {HINTS[kind]}" if kind in HINTS else ""
    raise TrimtabError(f"{path}: rows must be in a {FORMATS} file, not {kind or 'a file without a suffix'}{fix}")


# ---- JSON --------------------------------------------------------------------------------------------------------


def _jsonl(path: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would split at U+2028, which JSON allows
        if line.strip():
            yield f"{path}:{number}", parse_json(line, f"{path}:{number}", hint=_of_line(line.strip()))


def _of_line(line: str) -> str:
    """A hint at what may be wrong with a line that should be JSON."""
    if line.startswith(("#", "//")):
        return "; JSON has no comments: take the line out"
    if line.endswith(","):
        return "; JSON lines have one object per line, without commas between them"
    if line in ("[", "{"):
        return "; JSON lines have one object per line; call a file that is one JSON text .json"
    return ""


def _json(path: Path, text: str) -> Rows:
    if not text.strip():
        return
    if _is_lines(text):  # pandas and datasets write JSON lines into files called .json
        yield from _jsonl(path, text)
        return
    trailing = re.search(r",\s*[\]}]\s*$", text)
    items = parse_json(text, str(path), hint="; JSON has no comma after the last item" if trailing else "")
    if isinstance(items, dict):
        items = _of_object(items, path)
    if not isinstance(items, list):
        raise TrimtabError(f"{path} must contain a list of objects, not a {type(items).__name__}")
    for number, item in enumerate(items, 1):
        yield f"{path}: item {number}", item


def _is_lines(text: str) -> bool:
    """Whether the text is JSON lines."""
    first, _, rest = text.strip().partition("\n")
    if not first.startswith("{") or not rest:
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _of_object(item: dict[str, Any], path: Path) -> list[Any]:
    """The rows of a table that is stored by column, as pandas and datasets do, or as a list under a single key."""
    if card := _kind_of_card(item):
        raise TrimtabError(
            f"{path} is {card}, not a list of objects: it has system prompts and questions, but no answers to them;"
            f" `trimtab make --card {quote(str(path))}` has the model answer them (in Python, `read_trait` reads it)"
        )
    columns = {name: _column(value) for name, value in item.items()}
    lengths = {len(column) if isinstance(column, list) else None for column in columns.values()}
    if len(columns) == 1 and None not in lengths:
        ((name, rows),) = columns.items()
        if item[name] is rows and all(isinstance(row, (dict, list)) for row in rows):
            return rows
        return [{name: cell} for cell in rows]
    rows = [cell for column in columns.values() if isinstance(column, list) for cell in column]
    if (
        len(lengths) == 1
        and None not in lengths
        and not all(isinstance(row, dict) and not is_turn(row) for row in rows)
    ):
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    lists = [repr(name) for name, value in item.items() if isinstance(value, list)]
    where = f"; its lists are {', '.join(lists)}: save one of them as a separate file" if lists else ""
    raise TrimtabError(f"{path} must contain a list of objects, not a dict{where}")


def _kind_of_card(item: dict[str, Any]) -> str:
    """What a trait card is called; an empty string for any other object."""
    both_sides = item["instruction"] if isinstance(item.get("instruction"), list) else []
    if (
        both_sides
        and "questions" in item
        and all(isinstance(s, dict) and {"pos", "neg"} <= s.keys() for s in both_sides)
    ):
        return "a trait file of persona vectors"
    return "a trait card" if item.keys() >= CARD_KEYS else ""


def _column(value: Any) -> Any:
    """A column as a list of cells; pandas writes an object with the row names as keys."""
    if isinstance(value, dict) and value and all(name.isdecimal() for name in value):
        return list(value.values())
    return value


def parse_json(text: str, where: str, *, hint: str = "") -> Any:
    """Parse JSON. Raises `TrimtabError`, naming the location, for invalid JSON, and for duplicate keys."""
    try:
        return json.loads(text, object_pairs_hook=unique_object)
    except TrimtabError as error:
        raise TrimtabError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise TrimtabError(f"{where}: not JSON: {error}{hint}") from None


def unique_object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these items, whose keys must be unique; `json` would silently keep the last."""
    made = dict(items)
    if len(made) < len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise TrimtabError(f"{twice!r} is there twice; keep one")
    return made


# ---- tables ------------------------------------------------------------------------------------------------------


def _csv(path: Path, text: str) -> Rows:
    return _table(path, text, SEPARATORS)


def _tsv(path: Path, text: str) -> Rows:
    return _table(path, text, ("\t", *SEPARATORS))


def _table(path: Path, text: str, separators: tuple[str, ...]) -> Rows:
    """The rows after a header line, split at the first separator in it; many spreadsheets use semicolons."""
    skipped_lines = len(text) - len(text.lstrip("\n"))
    header, _, rest = text[skipped_lines:].partition("\n")
    if declared := SAYS_SEPARATOR.fullmatch(header.strip()):
        separators = (declared[1],)
        skipped_lines, text = skipped_lines + 1, rest
        header = rest.partition("\n")[0]
    else:
        text = text[skipped_lines:]
    separator = next((mark for mark in separators if mark in header), separators[0])
    spaced = any(name.startswith(" ") for name in next(csv.reader([header], delimiter=separator), [])[1:])
    # a space after each separator means that it was written by hand, with quotes after the space
    reader = csv.DictReader(io.StringIO(text), strict=True, delimiter=separator, skipinitialspace=spaced)
    try:
        names = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
            raise TrimtabError(f"{path}: the header line has {twice[0]!r} twice; give each column a different name")
        for row in reader:
            where = f"{path}:{skipped_lines + reader.line_num}"
            if None in row or None in row.values():
                count = f"{len(names)} column{'' if len(names) == 1 else 's'}"
                raise TrimtabError(
                    f"{where}: {count} expected, as in the header line; put a text with a {_name(separator)} in quotes"
                )
            if any(cell.strip() for cell in row.values()):  # a spreadsheet may end with empty rows
                yield where, row
    except csv.Error as error:
        hint = '; double a quote inside a text, and put the text in quotes: "the ""best"" one"'
        raise TrimtabError(f"{path}:{skipped_lines + reader.reader.line_num}: not CSV: {error}{hint}") from error


def _name(separator: str) -> str:
    return {",": "comma", ";": "semicolon", "\t": "tab"}.get(separator, repr(separator))


def _columnar(path: Path, kind: str) -> Rows:
    if not path.is_file():
        raise read_error(path)
    what = "Parquet" if kind == ".parquet" else "Arrow"
    try:
        from pyarrow import ArrowException, ArrowInvalid, ipc, memory_map, parquet
    except ImportError:
        raise TrimtabError(f"{path}: {what} needs pyarrow, which isn't installed: pip install pyarrow") from None
    try:
        if what == "Parquet":
            table = parquet.read_table(path)
        else:
            try:
                table = ipc.open_file(memory_map(str(path))).read_all()
            except ArrowInvalid:  # datasets writes streams
                table = ipc.open_stream(memory_map(str(path))).read_all()
        rows = table.to_pylist()
    except (ArrowException, OSError) as error:
        raise TrimtabError(f"can't read {path} as {what}: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
}
"""Readers of text files, by suffix."""
