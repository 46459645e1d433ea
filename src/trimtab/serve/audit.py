"""The audit log: one line of JSON for each request, saying what steered it. Lines are only ever appended."""

from __future__ import annotations

import json
import os
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError


class Audit:
    """Appends to a file, one write a line; without a path it does nothing. `prompts`: write them down as well."""

    def __init__(self, path: Path | None = None, *, prompts: bool = False) -> None:
        self.prompts = prompts
        self._lock = threading.Lock()
        self._file: int | None = None
        if path is not None:
            try:
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            except OSError as error:
                raise TrimtabError(f"can't write the audit log {path}: {error.strerror}") from None

    def write(self, entry: dict[str, Any], prompt: Any = None) -> None:
        """One line, with the time; the prompt only where asked for."""
        if self._file is None:
            return
        line = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), **entry}
        if self.prompts:
            line["prompt"] = prompt
        data = json.dumps(line, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            os.write(self._file, data)

    def close(self) -> None:
        """Write it out to the disk, and close it."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None
