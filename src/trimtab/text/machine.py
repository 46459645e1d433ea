"""A text that is read piece by piece, and the marks in it that change what it is at: a state machine over bytes.

A mark may be cut anywhere by the pieces, which are what tokens add; it is known with the piece that completes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Marks = Mapping[str, str]
"""Which text leads to which mode."""
KEPT = 65_536
"""Of so many steps what came of them is remembered."""


@dataclass(frozen=True)
class State:
    """In which mode the machine is, and what it has read since that a mark may begin with."""

    mode: str
    held: bytes = b""


@dataclass(frozen=True)
class Step:
    """What a piece led to: the modes that it was in, in order, whether it completed a mark, and the state after it."""

    modes: tuple[str, ...]
    completed: bool
    state: State


@dataclass(frozen=True)
class Machine:
    """`modes` says of each mode which marks it looks for. A mark that leads to its own mode may overlap the next one.

    Where several marks end at the same place, the longest counts.
    """

    modes: Mapping[str, Marks]
    begins: str
    _marks: dict[str, list[tuple[bytes, str]]] = field(init=False, repr=False, compare=False)
    _known: dict[tuple[State, bytes], Step] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        marks = {
            mode: sorted(((text.encode(), to) for text, to in here.items()), key=lambda mark: -len(mark[0]))
            for mode, here in self.modes.items()
        }
        object.__setattr__(self, "_marks", marks)

    @property
    def start(self) -> State:
        """Before anything is read."""
        return State(self.begins)

    def read(self, state: State, piece: bytes) -> Step:
        """What a piece leads to from this state."""
        key = (state, piece)
        step = self._known.get(key)
        if step is None:
            if len(self._known) >= KEPT:
                self._known.clear()
            step = self._known[key] = self._read(state, piece)
        return step

    def _read(self, state: State, piece: bytes) -> Step:
        mode, held, modes, completed = state.mode, state.held, [state.mode], False
        for i in range(len(piece)):
            text = held + piece[i : i + 1]
            to = next((to for mark, to in self._marks[mode] if text.endswith(mark)), None)
            completed = completed or to is not None
            if to is None or to == mode:
                held = self._beginning(mode, text)
            else:
                mode, held = to, b""
                modes.append(mode)
        return Step(tuple(modes), completed, State(mode, held))

    def _beginning(self, mode: str, text: bytes) -> bytes:
        """The longest end of the text with which a mark may begin."""
        ends = (text[i:] for i in range(len(text)))
        return next((end for end in ends if any(m != end and m.startswith(end) for m, _ in self._marks[mode])), b"")
