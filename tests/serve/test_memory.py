"""What the C library keeps: counted by itself, in a process of its own, since arenas are never given up."""

from __future__ import annotations

import subprocess
import sys

import pytest

ARENAS = """
import ctypes, os, sys, tempfile, threading
from trimtab.serve.memory import limit_malloc_arenas
if sys.argv[1] == "few" and not limit_malloc_arenas():
    print(0), sys.exit()
libc = ctypes.CDLL(None)
if not hasattr(libc, "malloc_info"):
    print(0), sys.exit()
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
meet, names = threading.Barrier(8), []
def work():
    meet.wait()
    libc.malloc(1000)
    meet.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
libc.fopen.restype, libc.fclose.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
with tempfile.NamedTemporaryFile() as told:
    file = libc.fopen(told.name.encode(), b"w")
    libc.malloc_info(0, file), libc.fclose(file)
    print(told.read().count(b"<heap nr="))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="arenas are glibc's")
def test_threads_share_few_arenas() -> None:
    counts = {}
    for how in ("few", "many"):
        process = subprocess.run([sys.executable, "-c", ARENAS, how], capture_output=True, text=True, check=True)
        counts[how] = int(process.stdout)
    if not counts["many"]:
        pytest.skip("this C library has no arenas")
    assert counts["few"] <= 2 < counts["many"]
