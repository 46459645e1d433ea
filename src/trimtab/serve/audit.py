"""The audit log: lines of JSON that say who asked for what, what steered it, and what came of it.

A request that is answered has two lines, `begun` before its first token leaves and `ended` after its last; one that is
turned away has one, `refused`. Each line is whole: what can't be written to its end is taken back, and then the log is
in `trouble` until a line goes through again. Nobody is answered meanwhile (see `guard`).
"""

from __future__ import annotations

import asyncio
import fcntl
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
from trimtab.serve.refusals import Refusal

AGAIN = 1.0
"""Seconds between attempts to write to a log that is in trouble."""
LARGEST_FRAGMENT = 1 << 20
log: logging.Logger = logging.getLogger("trimtab")


class Audit:
    """Appends to a file; without a path it does nothing.

    Args:
        path: The file. It is this server's alone while it runs.
        prompts: Write prompts down as well.
        sync: Wait until each line is on the disk itself, which survives a loss of power.

    Raises:
        TrimtabError: The file can't be written, is none, or another server writes to it.
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
            # not blocking: a pipe that nobody reads would keep the server from starting
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
            mode = os.fstat(self._file).st_mode
        except OSError as error:
            raise TrimtabError(f"can't write the audit log {path}: {error.strerror}") from None
        self._regular = stat.S_ISREG(mode)
        if not self._regular and not stat.S_ISCHR(mode):
            raise TrimtabError(f"can't write the audit log {path}: it is no file; name one that is, or a new one")
        if self._regular:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise TrimtabError(
                    f"can't write the audit log {path}: another server writes to it; give each its own file"
                ) from None
            self._mend(path)

    def _mend(self, path: Path) -> None:
        """A last line that was cut, by a crash, becomes a line that says so and holds what there was of it."""
        assert self._file is not None
        size = os.fstat(self._file).st_size
        start = max(0, size - LARGEST_FRAGMENT)
        fragment = os.pread(self._file, size - start, start).rpartition(b"\n")[2]
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
        """One line, with the time; the prompt only where requested.

        Raises `Refusal`, with status 503, when it can't be written.
        """
        if self._file is None:
            return
        line = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), **entry}
        if self.prompts and prompt is not None:
            line["prompt"] = prompt
        data = json.dumps(_plain(line), ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._append(data)

    async def soon(self, entry: dict[str, Any], prompt: Any = None) -> None:
        """As `write`, without holding up the event loop where a line waits for the disk."""
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
                    raise OSError(None, "nothing more fits")
                rest = rest[written:]
            if self.sync and self._regular:
                os.fsync(self._file)
        except OSError as error:
            if self._regular:
                os.ftruncate(self._file, start)
            if self.trouble is None:
                log.error("the audit log can't be written: %s; nobody is answered until it can", error.strerror)
            self.trouble, self._tried = str(error.strerror), time.monotonic()
            raise unaudited() from None
        if self.trouble is not None:
            log.error("the audit log can be written again")
        self.trouble = None

    def check(self) -> bool:
        """Whether lines go through. Where the last one didn't, it is tried again, at most once a second."""
        if self.trouble is None:
            return True
        if time.monotonic() - self._tried < AGAIN:
            return False
        try:
            self.write({"event": "resumed", "trouble": self.trouble})
        except Refusal:
            return False
        return True

    def close(self) -> None:
        """Write it out to the disk, and close it."""
        with self._lock:
            if self._file is not None:
                if self._regular:
                    os.fsync(self._file)
                os.close(self._file)
                self._file = None


def unaudited() -> Refusal:
    """What is said while the log can't be written."""
    return Refusal(
        503, "the audit log can't be written, so nobody is answered; try again later", code="unaudited", retry=10
    )


def _plain(value: Any) -> Any:
    """The same with a text for each number that JSON has none for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
