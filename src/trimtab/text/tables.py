"""The rows of a file that somebody keeps data in: JSONL, JSON, CSV, TSV or Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.text.read import read_text

Rows = Iterator[tuple[str, Any]]
"""Rows, and where each is: `file:line`, or in a file without lines `file: item 1`."""
PARQUET = ".parquet"
FORMATS = ".jsonl, .json, .csv, .tsv or .parquet"


def read_rows(path: Path) -> Rows:
    """The rows of a file, read as its suffix says.

    Raises `TrimtabError` naming the file and the line for a missing file, one of another kind, or a malformed row.
    """
    kind = path.suffix.lower()
    if kind == PARQUET:
        return _parquet(path)
    if kind not in READERS:
        raise TrimtabError(f"{path}: rows come as {FORMATS}, not {kind or 'a file without a suffix'}")
    return READERS[kind](path, read_text(path))


def _jsonl(path: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would split at U+2028, which JSON allows
        if line.strip():
            yield f"{path}:{number}", parse_json(line, f"{path}:{number}")


def _json(path: Path, text: str) -> Rows:
    items = parse_json(text, str(path)) if text.strip() else []
    if isinstance(items, dict):
        items = _of_columns(items, path)
    if not isinstance(items, list):
        raise TrimtabError(f"{path} must hold a list of objects, it holds a {type(items).__name__}")
    for number, item in enumerate(items, 1):
        yield f"{path}: item {number}", item


def _of_columns(columns: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The rows of a table that is stored by its columns, as pandas and datasets do."""
    lengths = {len(column) if isinstance(column, list) else None for column in columns.values()}
    if len(columns) > 1 and len(lengths) == 1 and None not in lengths:
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    lists = [repr(name) for name, value in columns.items() if isinstance(value, list)]
    where = f"; its lists are {', '.join(lists)}: save one of them as a file of its own" if lists else ""
    raise TrimtabError(f"{path} must hold a list of objects, it holds a dict{where}")


def _csv(path: Path, text: str) -> Rows:
    return _table(path, text, _separator(text))


def _tsv(path: Path, text: str) -> Rows:
    return _table(path, text, "\t")


def _separator(text: str) -> str:
    """A comma, unless the header line has none: spreadsheets of many countries write semicolons."""
    header = text.lstrip("\n").partition("\n")[0]
    return next((mark for mark in (",", ";", "\t") if mark in header), ",")


def _table(path: Path, text: str, separator: str) -> Rows:
    reader = csv.DictReader(io.StringIO(text), strict=True, delimiter=separator)
    try:
        names = list(reader.fieldnames or [])
        if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
            raise TrimtabError(f"{path}: the header line has {twice[0]!r} twice; give each column a different name")
        for row in reader:
            if None in row or None in row.values():
                raise TrimtabError(f"{path}:{reader.line_num}: {len(names)} columns expected, as in the header line")
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise TrimtabError(f"{path}:{reader.reader.line_num}: not CSV: {error}") from error


def _parquet(path: Path) -> Rows:
    if not path.is_file():
        raise TrimtabError(f"there is no file {path}")
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise TrimtabError(f"{path}: Parquet is read by pyarrow, which isn't installed: pip install pyarrow") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise TrimtabError(f"can't read {path} as Parquet: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
}
"""By suffix, those of files that are text."""


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. Raises `TrimtabError`, naming the place, for anything else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TrimtabError(f"{where}: not JSON: {error}") from None
