"""Reading the package's own JSON files."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def read_json(name: str) -> Any:
    """The content of a JSON file in this package. The returned object is cached and shared, so don't modify it."""
    return json.loads(files("trimtab.data").joinpath(name).read_text(encoding="utf-8"))


def json_files(folder: str) -> list[str]:
    """The names of the JSON files in a folder of this package, sorted, as arguments for `read_json`."""
    here = files("trimtab.data").joinpath(folder)
    return sorted(f"{folder}/{file.name}" for file in here.iterdir() if file.name.endswith(".json"))
