"""How much memory a KV cache gets on a CPU, where the machine's memory is not the model's alone.

Left alone vLLM takes 92 % of it, as of a GPU's: a model of 135 million parameters then makes a machine of 24 GiB swap.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SPACE = "VLLM_CPU_KVCACHE_SPACE"
"""vLLM's variable for it, in GiB; where it is set, it outdoes vLLM's options."""
OPTIONS = ("kv_cache_memory_bytes", "gpu_memory_utilization", "device_memory_utilization")
SHARE = 4
"""One part in so many of what is available."""
GIB = 2**30


def available_memory() -> int:
    """The bytes that processes can have without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def cpu_options(options: Mapping[str, Any], environment: Mapping[str, str], engines: int = 1) -> dict[str, Any]:
    """What an engine on a CPU gets besides: the KV cache of each worker, unless it is set already.

    Args:
        options: vLLM's engine arguments, as they are given.
        environment: This process's.
        engines: So many engines share the machine's memory.
    """
    if environment.get(SPACE) or any(options.get(name) is not None for name in OPTIONS):
        return {}
    sizes = (options.get(name) for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"))
    workers = engines
    for size in sizes:
        workers *= size or 1
    return {"kv_cache_memory_bytes": max(GIB, available_memory() // SHARE) // workers}


def cpu_space(more: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Likewise as a variable, which does nothing on a GPU, for a server with these options of vLLM's command line."""
    names = {argument.split("=")[0].lstrip("-").replace("-", "_") for argument in more}
    if environment.get(SPACE) or names & set(OPTIONS):
        return {}
    return {SPACE: str(max(1, available_memory() // SHARE // GIB))}
