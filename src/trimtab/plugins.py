"""Plugins: methods and engines of other distributions, found by their entry points.

    [project.entry-points."trimtab.methods"]
    median = "trimtab_median:RECIPE"

A plugin is imported only when it is requested by name or when all plugins are listed.
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
T = TypeVar("T")


class PluginWarning(UserWarning):
    """Another distribution's method or engine can't be loaded and is skipped."""


@dataclass(frozen=True)
class Plugin:
    """An entry point of another distribution.

    `kind` is "method" or "engine"; `distribution` is the distribution's name and version.
    """

    kind: str
    name: str
    distribution: str
    entry: EntryPoint

    def __str__(self) -> str:
        return f"the {self.kind} {self.name!r} of {self.distribution}"

    def load(self) -> Any:
        """Import the object that the entry point names.

        Raises:
            TrimtabError: It can't be imported. The message names the distribution.
        """
        try:
            return self.entry.load()
        except (Exception, SystemExit) as error:  # the plugin's code may raise anything
            raise self.load_error(error) from error

    def load_error(self, reason: object) -> TrimtabError:
        """The error for a plugin that can't be loaded, with the reason and the fix."""
        why = f"{type(reason).__name__}: {reason}" if isinstance(reason, BaseException) else reason
        return TrimtabError(f"{self} ({self.entry.value}) can't be loaded: {why}; update or uninstall it")


def find_plugin(group: str, name: str, own: Collection[str]) -> Plugin | None:
    """The plugin with this name in the group `METHODS` or `ENGINES`; `None` if there is none.

    Raises:
        TrimtabError: Two plugins have this name, or it is among trimtab's own names `own`.
    """
    return _unique_by_name(group, entry_points(group=group, name=name), own).get(name)


def find_plugins(group: str, own: Collection[str]) -> dict[str, Plugin]:
    """All plugins of the group, by name in alphabetical order, without importing them.

    Raises:
        TrimtabError: Two plugins have the same name, or a name is among trimtab's own names `own`.
    """
    return dict(sorted(_unique_by_name(group, entry_points(group=group), own).items()))


def load_plugins(by_name: Mapping[str, Plugin], make: Callable[[Plugin], T]) -> dict[str, T]:
    """Call `make` on each plugin. A plugin that can't be loaded is skipped, with a `PluginWarning`."""
    made: dict[str, T] = {}
    for name, candidate in by_name.items():
        try:
            made[name] = make(candidate)
        except TrimtabError as error:
            warnings.warn(str(error), PluginWarning, stacklevel=3)
    return made


def _unique_by_name(group: str, entries: Collection[EntryPoint], own_names: Collection[str]) -> dict[str, Plugin]:
    kind = group.rpartition(".")[2].removesuffix("s")
    by_name: dict[str, Plugin] = {}
    for entry in entries:
        candidate = Plugin(kind, entry.name, _distribution(entry), entry)
        other = by_name.get(candidate.name)
        if other is None and candidate.name not in own_names:
            by_name[candidate.name] = candidate
            continue
        first = f"trimtab's own {kind} {candidate.name!r}" if other is None else str(other)
        raise TrimtabError(
            f"{first} and {candidate} have the same name; uninstall {candidate.distribution.split()[0]}, or rename it"
            " there"
        )
    return by_name


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown distribution"
