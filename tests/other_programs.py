"""Other programs: vLLM, and the libraries whose files are read and written, in a folder of their own (`make peers`)."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(os.environ.get("TRIMTAB_PEERS") or Path(__file__).parents[1] / "build" / "peers")


def has_vllm() -> bool:
    """Whether vLLM is installed. Where it isn't, the folder of its engine's tests looks like a package of this name."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


def library(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """Another program's module, from the folder that `make peers` fills; the test is skipped where it isn't there."""
    if FOLDER.is_dir():
        monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    # repeng 0.4.0 names numpy's old alias in an annotation, and needs nothing else of numpy below 2
    monkeypatch.setattr(np, "float_", np.float64, raising=False)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} isn't there ({error}); `make peers` fetches it")
