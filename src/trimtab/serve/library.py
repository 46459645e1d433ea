"""The steerings that requests can name: those of a folder, read once at startup, and those added at runtime.

A name in a request is only looked up here, never in the file system, and nothing that is added is written to disk. An
added steering belongs to its owner: others see neither it nor its name, and may use the same name for something else.
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
from trimtab.serve.bounds import check_bounds, size_of
from trimtab.serve.fields import NAME
from trimtab.serve.policy import Policy, check_names
from trimtab.steering import Steering

MOST_ADDED = 64
"""Steerings added at runtime, by all owners together."""
MOST_OWNED = 16
"""Steerings added by one owner."""
MOST_BYTES = 256 << 20
"""Memory of all added steerings together."""


@dataclass(frozen=True)
class LoadedSteering:
    """A steering with its name. `source`: `"file"`, `"uploaded"`, `"learned"` or `"made"`.

    `owner` is the name of the key that added it; `None`: anybody may use it.
    """

    name: str
    steering: Steering
    digest: str
    source: str
    owner: str | None = None


class Library:
    """Steerings by owner and name, for any thread: each change replaces the dictionary, so reading needs no lock."""

    def __init__(self, lm: LM, loaded: Sequence[LoadedSteering] = ()) -> None:
        self.lm = lm
        self._lock = threading.Lock()
        self._loaded = {(entry.owner, entry.name): entry for entry in loaded}

    @property
    def names(self) -> list[str]:
        """The sorted names of the steerings without an owner."""
        return sorted(name for owner, name in self._loaded if owner is None)

    def get(self, name: str, owner: str | None = None) -> LoadedSteering | None:
        """The steering with this name: the owner's own, or one without an owner."""
        return self._loaded.get((owner, name)) or self._loaded.get((None, name))

    def of(self, owner: str | None) -> list[LoadedSteering]:
        """The steerings without an owner and those of this owner, sorted by name."""
        loaded = self._loaded.values()
        by_name = {entry.name: entry for entry in loaded if entry.owner is None}
        by_name |= {entry.name: entry for entry in loaded if entry.owner == owner}
        return [by_name[name] for name in sorted(by_name)]

    def add(self, name: str, steering: Steering, source: str, owner: str | None = None) -> LoadedSteering:
        """Add a steering.

        Raises:
            TrimtabError: The owner already has this name, or it is invalid; the steering doesn't fit the model; or
                there are too many.
            Refusal: It has more parts than an uploaded one may have (`check_bounds`).
        """
        if not re.fullmatch(NAME, name):
            raise TrimtabError("a steering's name has letters, digits, '.', '_' and '-', 64 at most")
        check_bounds(steering)
        self.lm.check(steering)
        if not steering.edits:
            raise TrimtabError("the steering has no edits")
        entry = LoadedSteering(name, steering, steering_digest(steering), source, owner)
        with self._lock:
            if (owner, name) in self._loaded:
                raise TrimtabError(f"there is already a steering {name!r}; choose another name")
            added = [other for other in self._loaded.values() if other.source != "file"]
            if len(added) >= MOST_ADDED or sum(other.owner == owner for other in added) >= self._most_of(owner):
                raise TrimtabError("the server can't keep more added steerings; delete one that isn't needed")
            if sum(size_of(other.steering) for other in added) + size_of(steering) > MOST_BYTES:
                raise TrimtabError(f"added steerings can take up at most {MOST_BYTES >> 20} MiB; delete one")
            self._loaded = {**self._loaded, (owner, name): entry}
        return entry

    def remove(self, name: str, owner: str | None = None) -> LoadedSteering | None:
        """Remove what the owner added under this name; returns `None` if there is none. Files stay."""
        with self._lock:
            entry = self._loaded.get((owner, name))
            if entry is None or entry.source == "file":
                return None
            self._loaded = {at: other for at, other in self._loaded.items() if at != (owner, name)}
            return entry

    def replace_files(self, other: Library) -> tuple[list[str], list[str], list[str]]:
        """Replace this library's files with those of another one, all at once. Running requests keep their steerings.

        Returns:
            The names that are new, those whose steering has changed, and those that are gone.
        """
        with self._lock:
            before = {
                name: entry for (owner, name), entry in self._loaded.items() if entry.source == "file" and owner is None
            }
            after = {name: entry for (owner, name), entry in other._loaded.items() if owner is None}
            kept = {at: entry for at, entry in self._loaded.items() if entry.source != "file"}
            self._loaded = {**{(None, name): entry for name, entry in after.items()}, **kept}
        changed = [name for name in after.keys() & before.keys() if after[name].digest != before[name].digest]
        return sorted(after.keys() - before.keys()), sorted(changed), sorted(before.keys() - after.keys())

    @staticmethod
    def _most_of(owner: str | None) -> int:
        return MOST_ADDED if owner is None else MOST_OWNED


def files_of(folder: Path) -> list[Path]:
    """The steering files of a folder. Raises `TrimtabError` if there are none, or if one isn't a regular file or has an
    invalid name.
    """
    paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        if not path.is_file():  # reading a pipe would wait for its writer
            raise TrimtabError(f"{path} isn't a regular file; remove it from the folder, or rename it")
        if not re.fullmatch(NAME, path.stem):
            raise TrimtabError(
                f"{path}: a steering has the name of its file, which may contain letters, digits, '.', '_' and '-'"
            )
    if not paths:
        raise TrimtabError(f"{folder} has no .safetensors files; `trimtab make` and `trimtab learn` write them")
    return paths


def read_folder(lm: LM, folder: Path) -> Library:
    """All `.safetensors` files of a folder, under their file names. Raises `TrimtabError` for one that doesn't fit."""
    loaded = []
    for path in files_of(folder):
        steering = load_steering(path)
        try:
            lm.check(steering)
        except TrimtabError as error:
            raise TrimtabError(f"{path}: {error}") from None
        loaded.append(LoadedSteering(path.stem, steering, steering_digest(steering), "file"))
    return Library(lm, loaded)


def reload(library: Library, folder: Path, policy: Policy) -> tuple[list[str], list[str], list[str]]:
    """Read the folder again while the server runs; if anything is wrong with it, nothing changes.

    Running requests keep the steerings that they began with.

    Returns:
        The names that are new, those whose steering has changed, and those that are gone.

    Raises:
        TrimtabError: A file doesn't fit, the policy names one that is gone, or one that is always on has changed: its
            protection was computed for the old one.
    """
    fresh = read_folder(library.lm, folder)
    check_names(policy, fresh.names)
    for name, _ in policy.always:
        now, then = fresh.get(name), library.get(name)
        if now is None or then is None or now.digest != then.digest:
            raise TrimtabError(f"{name} is always on and has changed; restart the server to change it")
    return library.replace_files(fresh)
