"""Reading the package's own JSON files."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def read_json(name: str) -> Any:
    """The content of a file beside this one; what is returned is shared, so don't change it."""
    return json.loads(files("trimtab.data").joinpath(name).read_text(encoding="utf-8"))


def json_files(folder: str) -> list[str]:
    """The JSON files in a folder beside this one, in order, as `read_json` takes them."""
    here = files("trimtab.data").joinpath(folder)
    return sorted(f"{folder}/{file.name}" for file in here.iterdir() if file.name.endswith(".json"))
