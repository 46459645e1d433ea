"""What other distributions bring: methods and engines, found by their entry points.

    [project.entry-points."trimtab.methods"]
    median = "trimtab_median:RECIPE"

Nothing of a distribution is imported until it is requested by name, or all are listed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from trimtab.errors import TrimtabError

METHODS = "trimtab.methods"
ENGINES = "trimtab.engines"
Made = TypeVar("Made")


class PluginWarning(UserWarning):
    """Another distribution's method or engine can't be loaded, and the others go on without it."""


@dataclass(frozen=True)
class Plugin:
    """An entry point of another distribution: `kind` is "method" or "engine", `distribution` its name and version."""

    kind: str
    name: str
    distribution: str
    entry: EntryPoint

    def __str__(self) -> str:
        return f"the {self.kind} {self.name!r} of {self.distribution}"

    def load(self) -> Any:
        """What the entry point names. Raises `TrimtabError`, naming the distribution, where it can't be imported."""
        try:
            return self.entry.load()
        except (Exception, SystemExit) as error:  # foreign code raises whatever it likes
            raise self.broken(error) from error

    def broken(self, reason: object) -> TrimtabError:
        """The error that says why this plugin can't be used, and what to do about it."""
        why = f"{type(reason).__name__}: {reason}" if isinstance(reason, BaseException) else reason
        return TrimtabError(f"{self} ({self.entry.value}) can't be loaded: {why}; update or uninstall it")


def plugin(group: str, name: str, own: Collection[str]) -> Plugin | None:
    """The plugin of that name, of the group `METHODS` or `ENGINES`; `None` where there is none.

    Raises:
        TrimtabError: There are two of that name, or `own`, trimtab's names, has it too.
    """
    return _one_each(group, entry_points(group=group, name=name), own).get(name)


def plugins(group: str, own: Collection[str]) -> dict[str, Plugin]:
    """All plugins of the group by name, in the order of their names; none of them is imported.

    Raises:
        TrimtabError: There are two of a name, or `own`, trimtab's names, has it too.
    """
    return dict(sorted(_one_each(group, entry_points(group=group), own).items()))


def loaded(by_name: Mapping[str, Plugin], make: Callable[[Plugin], Made]) -> dict[str, Made]:
    """What `make` gives for each plugin; one that can't be loaded is left out, with a `PluginWarning`."""
    made: dict[str, Made] = {}
    for name, candidate in by_name.items():
        try:
            made[name] = make(candidate)
        except TrimtabError as error:
            warnings.warn(str(error), PluginWarning, stacklevel=3)
    return made


def _one_each(group: str, entries: Collection[EntryPoint], own: Collection[str]) -> dict[str, Plugin]:
    kind = group.rpartition(".")[2].removesuffix("s")
    by_name: dict[str, Plugin] = {}
    for entry in entries:
        candidate = Plugin(kind, entry.name, _distribution(entry), entry)
        other = by_name.get(candidate.name)
        if other is None and candidate.name not in own:
            by_name[candidate.name] = candidate
            continue
        first = f"trimtab's own {kind} {candidate.name!r}" if other is None else str(other)
        raise TrimtabError(
            f"{first} and {candidate} have one name; uninstall {candidate.distribution.split()[0]}, or rename it there"
        )
    return by_name


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown distribution"
