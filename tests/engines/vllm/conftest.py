"""vLLM stands in an environment of its own: `make test-vllm` makes it, and runs these there module by module."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from other_programs import has_vllm

WITH_ENGINE = (
    "engine",
    "static",
    "learning",
    "adapters",
    "compiled",
    "processes",
    "parallel",
    "serve",
    "ray",
    "emphasis_families",
    "second_runner",
)
ENGINES = {f"test_{name}.py" for name in WITH_ENGINE}

os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # not to the one core that others may be on


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not has_vllm():
        skip = pytest.mark.skip(reason="vLLM isn't installed in this environment; make test-vllm runs these")
        for item in items:
            if Path(item.path).name in ENGINES and Path(item.path).parent == Path(__file__).parent:
                item.add_marker(skip)
