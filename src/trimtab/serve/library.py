"""The steerings that requests can name: those of a folder, read once at the start, and those added while it runs.

A request's name is looked up among these and goes nowhere else; nothing that is added is written to disk.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import TrimtabError
from trimtab.files.steering_file import load_steering, steering_digest
from trimtab.lm import LM
from trimtab.serve.schema import NAME
from trimtab.steering import Steering

MOST_ADDED = 64


@dataclass(frozen=True)
class Loaded:
    """A steering under its name. `source`: `"file"`, `"uploaded"`, `"learned"` or `"made"`."""

    name: str
    steering: Steering
    digest: str
    source: str


class Library:
    """Steerings by name. `add` from any thread."""

    def __init__(self, lm: LM, loaded: Sequence[Loaded] = ()) -> None:
        self.lm = lm
        self._lock = threading.Lock()
        self._loaded = {one.name: one for one in loaded}

    @property
    def names(self) -> list[str]:
        """All names, in order."""
        return sorted(self._loaded)

    def get(self, name: str) -> Loaded | None:
        """The steering of this name."""
        return self._loaded.get(name)

    def add(self, name: str, steering: Steering, source: str) -> Loaded:
        """One more. Raises `TrimtabError` for a name that is taken or no name, and a steering that doesn't fit."""
        if not re.fullmatch(NAME, name):
            raise TrimtabError("a steering's name has letters, digits, '.', '_' and '-', 64 at most")
        self.lm.check(steering)
        if not steering.edits:
            raise TrimtabError("the steering has no edits")
        found = Loaded(name, steering, steering_digest(steering), source)
        with self._lock:
            if name in self._loaded:
                raise TrimtabError(f"there is a steering {name!r} already; choose another name")
            if sum(one.source != "file" for one in self._loaded.values()) >= MOST_ADDED:
                raise TrimtabError(f"{MOST_ADDED} steerings were added already; the server keeps no more")
            self._loaded[name] = found
        return found


def read_folder(lm: LM, folder: Path) -> Library:
    """All `.safetensors` files of a folder, named as the files are. Raises `TrimtabError` for one that doesn't fit."""
    loaded = []
    for path in sorted(folder.glob("*.safetensors")):
        if not re.fullmatch(NAME, path.stem):
            raise TrimtabError(f"{path}: a steering is named as its file, in letters, digits, '.', '_' and '-'")
        steering = load_steering(path)
        try:
            lm.check(steering)
        except TrimtabError as error:
            raise TrimtabError(f"{path}: {error}") from None
        loaded.append(Loaded(path.stem, steering, steering_digest(steering), "file"))
    if not loaded:
        raise TrimtabError(f"{folder} has no .safetensors files; `trimtab learn` writes them")
    return Library(lm, loaded)
