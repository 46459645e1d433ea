"""Atomic writing of files, and a check beforehand whether a file can be written."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from trimtab.errors import TrimtabError


def check_target(path: str | Path, suffix: str) -> None:
    """Raises `TrimtabError` if a file of this kind can't be written there. Leaves nothing behind."""
    path = Path(path)
    if path.suffix != suffix:
        raise TrimtabError(f"{path} must be named *{suffix}, since that is the format that is written")
    if path.is_dir():
        raise TrimtabError(f"can't write {path}: it is a folder; name a file in it")
    probe = _temporary_path(path)
    try:
        probe.open("xb").close()
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        probe.unlink(missing_ok=True) if path.parent.is_dir() else None


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file by way of a temporary file in its folder, so that readers never see a partial file.

    Raises `TrimtabError` if the folder doesn't exist or can't be written.
    """
    # its name is chosen before it exists, so that an interruption can't leave it behind
    temporary = _temporary_path(path)
    try:
        try:
            stream = temporary.open("xb")
        except OSError as error:
            raise _unwritable(path, error) from None
        with stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        raise


def _temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


def _unwritable(path: Path, error: OSError) -> TrimtabError:
    return TrimtabError(f"can't write {path}: {error.strerror}; the folder must exist and be writable")
