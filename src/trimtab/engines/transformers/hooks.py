"""Hooks that are attached and removed many times, such as once per token in continuous batching.

Registering a hook costs more than a steering's addition. So each hook is registered once; afterwards it is inserted
into and deleted from its module's hook dictionary directly, under the id that it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.utils.hooks import RemovableHandle

Attach = Callable[[], Any]
"""Attaches something to the model and returns a handle with `remove()`."""


class Hooks:
    """Hooks that are on the model while `open`. The constructor attaches each once, to get its id, and removes it.

    If a module's hook dictionary is replaced afterwards, its hook isn't attached. Callers detect this by counting the
    calls of their hooks.

    Args:
        attachers: A function for each hook that attaches it.
    """

    def __init__(self, attachers: Sequence[Attach]) -> None:
        self._entries: list[tuple[dict[Any, Any], int, Any]] = []
        self._others: list[Attach] = []  # handles that aren't plain hooks
        for attach in attachers:
            handle = attach()
            try:
                entries = _entries(handle)
            finally:
                handle.remove()
            if entries is None:
                self._others.append(attach)
            else:
                self._entries += entries

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keep the hooks on the model within the context."""
        entries = self._entries
        with ExitStack() as others:
            try:
                for table, number, value in entries:
                    table[number] = value
                for attach in self._others:
                    others.callback(attach().remove)
                yield
            finally:
                for table, number, _ in entries:
                    table.pop(number, None)


def _entries(handle: Any) -> list[tuple[dict[Any, Any], int, Any]] | None:
    """The entries of this hook in its module's dictionaries: `(dictionary, hook id, value)`; `None` if unavailable."""
    if type(handle) is not RemovableHandle or not hasattr(handle, "hooks_dict_ref"):
        return None
    tables = [handle.hooks_dict_ref(), *(reference() for reference in getattr(handle, "extra_dict_ref", ()))]
    if any(table is None for table in tables) or handle.id not in tables[0]:
        return None
    return [(table, handle.id, table[handle.id]) for table in tables if handle.id in table]
