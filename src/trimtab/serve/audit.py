"""The audit log: lines of JSON that say who requested what, what steered it, and how it ended.

An answered request has two lines, `begun` before its first token is sent and `ended` after its last; a refused request
has one, `refused`. Lines are never partial: one that can't be written completely is removed again, and then the log is
in `trouble` until a write succeeds. No request is answered meanwhile (see `guard`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import stat
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.serve.file_lock import lock_file
from trimtab.serve.refusals import Refusal

RETRY_SECONDS = 1.0
"""Seconds between attempts to write to a log that is in trouble."""
LARGEST_FRAGMENT = 1 << 20
FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT
# Unix: a pipe without a reader must not keep the server from starting. Windows: bytes are written as they are.
FLAGS |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
log: logging.Logger = logging.getLogger("trimtab")


class Audit:
    """Appends to a file; without a path it does nothing.

    Args:
        path: The file. No other process may write to it while the server runs.
        prompts: Also log prompts.
        sync: Wait until each line is on the disk itself, which survives a power failure.

    Raises:
        TrimtabError: The path can't be written or isn't a file, or another server writes to it.
    """

    def __init__(self, path: Path | None = None, *, prompts: bool = False, sync: bool = False) -> None:
        self.prompts = prompts
        self.sync = sync
        self.trouble: str | None = None
        self._lock = threading.Lock()
        self._file: int | None = None
        self._regular = False
        self._tried = 0.0
        if path is not None:
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            self._file = os.open(path, FLAGS, 0o600)
            mode = os.fstat(self._file).st_mode
        except OSError as error:
            raise TrimtabError(f"can't write the audit log {path}: {error.strerror}") from None
        self._regular = stat.S_ISREG(mode)
        if not self._regular and not stat.S_ISCHR(mode):
            raise TrimtabError(
                f"can't write the audit log {path}: it isn't a regular file; name a regular or a new file"
            )
        if self._regular:
            try:
                lock_file(self._file)
            except OSError:
                raise TrimtabError(
                    f"can't write the audit log {path}: another server is writing to it; give each server its own file"
                ) from None
            self._mend(path)

    def _mend(self, path: Path) -> None:
        """Replace an incomplete last line, left by a crash, with a line that says so and contains the fragment."""
        assert self._file is not None
        size = os.fstat(self._file).st_size
        start = max(0, size - LARGEST_FRAGMENT)
        os.lseek(self._file, start, os.SEEK_SET)
        fragment = os.read(self._file, size - start).rpartition(b"\n")[2]
        if not fragment:
            return
        os.ftruncate(self._file, size - len(fragment))
        try:
            self.write({"event": "mended", "fragment": fragment.decode("utf-8", "backslashreplace")})
        except Refusal as refusal:
            raise TrimtabError(f"can't write the audit log {path}: {refusal.message}") from None

    @property
    def on(self) -> bool:
        """Whether there is a log."""
        return self._file is not None

    def write(self, entry: dict[str, Any], prompt: Any = None) -> None:
        """Write one line, with the time; the prompt only if the log includes prompts.

        Raises `Refusal`, with status 503, if it can't be written.
        """
        if self._file is None:
            return
        line = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), **entry}
        if self.prompts and prompt is not None:
            line["prompt"] = prompt
        data = json.dumps(_plain(line), ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._append(data)

    async def write_async(self, entry: dict[str, Any], prompt: Any = None) -> None:
        """Like `write`, without blocking the event loop while a line waits for the disk."""
        if self.sync and self._file is not None:
            await asyncio.to_thread(self.write, entry, prompt)
        else:
            self.write(entry, prompt)

    def _append(self, data: bytes) -> None:
        if self._file is None:  # closed in the meantime
            return
        start = os.fstat(self._file).st_size if self._regular else 0
        try:
            rest = memoryview(data)
            while rest:
                written = os.write(self._file, rest)
                if not written:
                    raise OSError(None, "no space left")
                rest = rest[written:]
            if self.sync and self._regular:
                os.fsync(self._file)
        except OSError as error:
            if self._regular:
                os.ftruncate(self._file, start)
            if self.trouble is None:
                log.error("the audit log can't be written: %s; requests are refused until it can", error.strerror)
            self.trouble, self._tried = str(error.strerror), time.monotonic()
            raise unaudited() from None
        if self.trouble is not None:
            log.error("the audit log can be written again")
        self.trouble = None

    def check(self) -> bool:
        """Whether lines can be written. After a failure it tries again, at most once a second."""
        if self.trouble is None:
            return True
        if time.monotonic() - self._tried < RETRY_SECONDS:
            return False
        try:
            self.write({"event": "resumed", "trouble": self.trouble})
        except Refusal:
            return False
        return True

    def close(self) -> None:
        """Flush the log to the disk, and close it."""
        with self._lock:
            if self._file is not None:
                if self._regular:
                    os.fsync(self._file)
                os.close(self._file)
                self._file = None


def unaudited() -> Refusal:
    """The refusal of requests while the log can't be written."""
    return Refusal(
        503, "the audit log can't be written, so requests are refused; try again later", code="unaudited", retry=10
    )


def _plain(value: Any) -> Any:
    """The value, with numbers that JSON can't represent (NaN, infinities) converted to text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
