"""The access log: one line of JSON per request, with its outcome, without prompts or answers.

It is for the server's operator. Who was steered and how is in the audit log (`audit.py`), which is never truncated.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from trimtab.errors import TrimtabError

LONGEST_PATH = 200
"""Longer request paths are truncated to this many characters, since anyone can send any path."""


class AccessLog:
    """Writes lines to a file, or to standard error for `-`. A line that can't be written is dropped and counted.

    Raises:
        TrimtabError: The file can't be written.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._lost = 0
        self._file: TextIO = sys.stderr
        self.reopen()

    def reopen(self) -> None:
        """Reopen the file, which another program (logrotate) may have moved away."""
        if str(self._path) == "-":
            return
        try:
            opened = self._path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise TrimtabError(f"can't write the access log {self._path}: {error.strerror}") from None
        with self._lock:
            before, self._file = self._file, opened
        if before is not sys.stderr:
            before.close()

    def write(self, scope: Any, state: Any, status: int, seconds: float) -> None:
        """Log a request that is complete, or whose client has disconnected."""
        key, client = state.get("key"), scope.get("client")
        line = {
            "time": round(self._clock(), 3),
            "request": state["request_id"],
            "client": client[0] if client else None,
            "key": key.name if key is not None else None,
            "method": scope["method"],
            "path": scope["path"][:LONGEST_PATH],
            "status": status,
            "seconds": round(seconds, 4),
        }
        with self._lock:
            if self._lost:
                line["lost"] = self._lost
            try:
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()
                self._lost = 0
            except (OSError, ValueError):  # a full disk or a closed pipe: keep serving
                self._lost += 1
