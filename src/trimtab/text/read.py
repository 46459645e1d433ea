"""Reading a text file that a person wrote."""

from __future__ import annotations

from pathlib import Path

from trimtab.errors import TrimtabError


def read_text(path: Path) -> str:
    """The file's text: UTF-8, with or without a byte-order mark, every line ending as a newline.

    Raises `TrimtabError` when it isn't there, isn't UTF-8, or can't be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise TrimtabError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise TrimtabError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise TrimtabError(f"can't read {path}: {error.strerror}") from None
