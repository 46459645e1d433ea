"""What the C library keeps of memory that Python has given back: little, in a process that runs for weeks.

glibc gives each thread that finds the others busy an arena of its own, up to eight for each core, and what is freed in
one serves no other. The server's threads come and go, and read bodies of a megabyte: without a leak, its resident set
would go on growing for as long as there are arenas that haven't had a large one yet.
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
"""How often what is free is given back to the system."""


def keep_little() -> bool:
    """Have this process use few arenas, and give back what is free from time to time; whether it could.

    Elsewhere than with glibc nothing is done, and no arenas are set where the environment sets them (MALLOC_ARENA_MAX).
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
