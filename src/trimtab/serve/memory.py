"""Limit how much freed memory the C library keeps, for a process that runs for weeks.

glibc gives each thread that finds the others' arenas busy an arena of its own, up to eight per core, and memory freed
in one can't be used by another. The server's threads come and go, and read bodies of a megabyte: its resident set would
keep growing, without a leak, for as long as some arenas haven't held a large body yet.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

ARENAS = 2
ARENA_MAX = -8  # M_ARENA_MAX in malloc.h
TRIM_SECONDS = 60.0
"""Seconds between two times at which free memory is returned to the system."""


def limit_malloc_arenas() -> bool:
    """Make this process use few arenas, and return free memory to the system from time to time; whether that worked.

    Does nothing without glibc. Doesn't set the number of arenas if the environment does (MALLOC_ARENA_MAX).
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    with suppress(AttributeError):
        if "MALLOC_ARENA_MAX" not in os.environ:
            library.mallopt(ARENA_MAX, ARENAS)
        threading.Thread(target=_trim, args=(library.malloc_trim,), name="trimtab-trim", daemon=True).start()
        return True
    return False


def _trim(trim: Any) -> None:
    while True:
        time.sleep(TRIM_SECONDS)
        trim(0)
