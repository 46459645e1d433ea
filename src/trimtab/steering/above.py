"""What stands above and is looked up when it is called, so that plain data can be saved, shown and drawn by itself."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def above(module: str, name: str) -> Any:
    """A function of a module that stands above, `trimtab.` left out: only a word for whoever types it."""
    return getattr(import_module(f"trimtab.{module}"), name)
