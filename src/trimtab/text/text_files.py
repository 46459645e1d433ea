"""Reads text files that were written by hand, or exported by a program."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError

COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
"""Decompression functions of Python's standard library, by suffix."""
MARKS: dict[bytes, str] = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16's, which is a prefix of it
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
"""Byte-order marks, and their encodings."""
HINTS = {
    **dict.fromkeys((".zst", ".zip", ".7z", ".tar", ".tgz"), "unpack it first"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV"),
}
"""What to do with a file that isn't text, by suffix."""


def kind_of(path: Path) -> str:
    """The lowercase suffix that tells the format of a file; `.jsonl` also for `rows.JSONL.gz`."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()


def read_text(path: Path) -> str:
    """The text of a file, with newlines normalized: UTF-8, or the encoding of its byte-order mark; optionally
    compressed.

    Raises `TrimtabError` if the file doesn't exist, isn't such text, or can't be read.
    """
    try:
        data = path.read_bytes()
        if unpack := COMPRESSED.get(path.suffix.lower()):
            data = unpack(data)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise TrimtabError(f"can't unpack {path}: {error}") from None
    except OSError as error:
        raise read_error(path, error) from None
    mark = next((mark for mark in MARKS if data.startswith(mark)), b"")
    try:
        text = data[len(mark) :].decode(MARKS.get(mark, "utf-8"))
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start + len(mark)}"
        fix = HINTS.get(path.suffix.lower(), "save it as UTF-8")
        raise TrimtabError(f"{path} is not UTF-8 text ({place}); {fix}") from None
    if "\0" in text:
        raise TrimtabError(f"{path} contains null bytes, as UTF-16 without a byte-order mark does; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_error(path: Path, error: Any = None) -> TrimtabError:
    """An error that says why a file can't be read; if it doesn't exist, with a hint at what may have been meant."""
    if path.is_dir():
        return TrimtabError(f"can't read {path}: it is a folder; name a file in it")
    if error is not None and not isinstance(error, FileNotFoundError):
        return TrimtabError(f"can't read {path}: {error.strerror or error}")
    name = str(path)
    hint = ""
    if ":/" in name:
        hint = "; nothing is downloaded from a URL: download the file, and name it"
    elif any(mark in name for mark in "*?"):
        hint = "; wildcards aren't expanded: name one file"
    elif name.count("/") == 1 and not path.suffix:
        hint = "; save a data set of the Hub to a file first: load_dataset(…).to_json('rows.jsonl')"
    return TrimtabError(f"there is no file {path}{hint}")
