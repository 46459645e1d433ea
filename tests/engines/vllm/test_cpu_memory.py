"""The memory of an engine on a CPU: what trimtab says of it, where nobody else has."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.commands.serve_vllm import vllm_environment
from trimtab.engines.vllm import memory
from trimtab.engines.vllm.memory import GIB, available_memory, cpu_options, cpu_space


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 20 * GIB)


def test_a_quarter_of_what_is_available() -> None:
    assert 0 < available_memory() < 2**50
    assert cpu_options({}, {}) == {"kv_cache_memory_bytes": 5 * GIB}
    assert cpu_options({"tensor_parallel_size": 2, "dtype": None}, {}) == {"kv_cache_memory_bytes": 5 * GIB // 2}
    assert cpu_space([], {}) == {"VLLM_CPU_KVCACHE_SPACE": "5"}
    assert vllm_environment({}, None)["VLLM_CPU_KVCACHE_SPACE"] == "5"


def test_a_small_machine_has_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: GIB)
    assert cpu_options({}, {}) == {"kv_cache_memory_bytes": GIB}
    assert cpu_space([], {}) == {"VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.mark.parametrize("options", [{"kv_cache_memory_bytes": 1}, {"gpu_memory_utilization": 0.5}])
def test_who_says_it_is_left_alone(options: dict[str, Any]) -> None:
    assert cpu_options(options, {}) == {}
    ((name, value),) = options.items()
    assert cpu_space([f"--{name.replace('_', '-')}={value}"], {}) == {}
    assert cpu_space([f"--{name}", str(value)], {}) == {}
    assert cpu_options({}, {"VLLM_CPU_KVCACHE_SPACE": "2"}) == cpu_space([], {"VLLM_CPU_KVCACHE_SPACE": "2"}) == {}
    assert vllm_environment({"VLLM_CPU_KVCACHE_SPACE": "2"}, None)["VLLM_CPU_KVCACHE_SPACE"] == "2"
