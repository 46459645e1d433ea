"""An exclusive lock on an open file, which ends when the file is closed or the process ends.

On Unix the whole file is locked, and only for programs that lock it as well. Windows locks bytes, for all programs: the
one that is locked is 2 GiB from the start, so that the lines before it can be read.
"""

from __future__ import annotations

import os

LOCKED_BYTE = 0x7FFF_FFFE
"""The byte that is locked on Windows, whose C library takes 31-bit positions. It needn't exist."""

try:
    import fcntl
except ImportError:
    import msvcrt

    def lock_file(descriptor: int) -> None:
        """Lock the file that this descriptor refers to, without waiting. Raises `OSError` if it is locked."""
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
else:

    def lock_file(descriptor: int) -> None:
        """Lock the file that this descriptor refers to, without waiting. Raises `OSError` if it is locked."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
