"""Hooks that are put on a model's modules and taken off many times: once a token, where rows come and go.

Registering a hook anew costs more than an addition does. Here each is registered once; from then on it is put into the
module's table of hooks and taken out again, under the number that it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.utils.hooks import RemovableHandle

Attach = Callable[[], Any]
"""Puts something on the model, and returns what has `remove()`."""


class Hooks:
    """What is on the model while `open`; it is attached once here, and taken off at once.

    A module whose table of hooks was replaced since is left without: whoever opens these counts their calls.

    Args:
        attachers: What puts each of them there.
    """

    def __init__(self, attachers: Sequence[Attach]) -> None:
        self._entries: list[tuple[dict[Any, Any], int, Any]] = []
        self._others: list[Attach] = []  # what is more than a hook
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
        """The hooks are on the model for as long as the context is open."""
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
    """Where a module notes this hook, each table with what is noted there; `None` where that can't be seen."""
    if type(handle) is not RemovableHandle or not hasattr(handle, "hooks_dict_ref"):
        return None
    tables = [handle.hooks_dict_ref(), *(reference() for reference in getattr(handle, "extra_dict_ref", ()))]
    if any(table is None for table in tables) or handle.id not in tables[0]:
        return None
    return [(table, handle.id, table[handle.id]) for table in tables if handle.id in table]
