"""The size of the KV cache on a CPU, where other processes need the machine's memory too.

By default vLLM takes 92 % of it, as on a GPU. With a model of 135 million parameters, a machine with 24 GiB of memory
then swaps.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SPACE = "VLLM_CPU_KVCACHE_SPACE"
"""vLLM's environment variable for the size, in GiB; it overrides vLLM's options."""
OPTIONS = ("kv_cache_memory_bytes", "gpu_memory_utilization", "device_memory_utilization")
SHARE = 4
"""The KV cache gets this fraction, 1 / `SHARE`, of the available memory."""
GIB = 2**30


def available_memory() -> int:
    """The number of bytes that processes can allocate without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def cpu_options(options: Mapping[str, Any], environment: Mapping[str, str], engines: int = 1) -> dict[str, Any]:
    """Additional options for an engine on a CPU: the size of each worker's KV cache, unless it is already set.

    Args:
        options: The given engine arguments of vLLM.
        environment: This process's environment variables.
        engines: The number of engines that share the machine's memory.
    """
    if environment.get(SPACE) or any(options.get(name) is not None for name in OPTIONS):
        return {}
    sizes = (options.get(name) for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"))
    workers = engines
    for size in sizes:
        workers *= size or 1
    return {"kv_cache_memory_bytes": max(GIB, available_memory() // SHARE) // workers}


def cpu_space(more: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The same as an environment variable, for a server with these options of vLLM's; it has no effect on a GPU."""
    names = {argument.split("=")[0].lstrip("-").replace("-", "_") for argument in more}
    if environment.get(SPACE) or names & set(OPTIONS):
        return {}
    return {SPACE: str(max(1, available_memory() // SHARE // GIB))}
