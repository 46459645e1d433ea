"""Where steerings run."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from trimtab.errors import TrimtabError

ENGINES = {
    "vllm": ("trimtab.engines.vllm.lm", "VllmLM"),
    "llamacpp": ("trimtab.engines.llamacpp.model", "LlamaCpp"),
}
"""The engines beside transformers, which `LM` itself is: a module, and the class in it that `load` makes one of."""


def engine(name: str) -> Any:
    """The class of an engine. Raises `TrimtabError` for an unknown name."""
    if name not in ENGINES:
        raise TrimtabError(f"there is no engine {name!r}; engines: {', '.join(['transformers', *ENGINES])}")
    module, there = ENGINES[name]
    return getattr(import_module(module), there)
