"""A state machine over bytes that reads a text piece by piece and changes its mode at markers.

The pieces, which are what tokens add, may cut a marker anywhere; it is recognized at the piece that completes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Transitions = Mapping[str, str]
"""The texts of markers, each with the mode that it leads to."""
KEPT = 65_536
"""The maximum number of cached steps."""


@dataclass(frozen=True)
class State:
    """The machine's mode, and the bytes read since that may be the beginning of a marker."""

    mode: str
    pending: bytes = b""


@dataclass(frozen=True)
class Step:
    """The result of a piece: the modes passed through, in order, whether a marker was completed, and the new state."""

    modes: tuple[str, ...]
    completed: bool
    state: State


@dataclass(frozen=True)
class Machine:
    """`modes` maps each mode to the markers that it looks for. A marker that leads to its own mode may overlap the next
    one.

    If several markers end at the same place, the longest counts.
    """

    modes: Mapping[str, Transitions]
    initial_mode: str
    _marks: dict[str, list[tuple[bytes, str]]] = field(init=False, repr=False, compare=False)
    _steps: dict[tuple[State, bytes], Step] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        marks = {
            mode: sorted(((text.encode(), to) for text, to in here.items()), key=lambda mark: -len(mark[0]))
            for mode, here in self.modes.items()
        }
        object.__setattr__(self, "_marks", marks)

    @property
    def start(self) -> State:
        """The state before anything is read."""
        return State(self.initial_mode)

    def read(self, state: State, piece: bytes) -> Step:
        """The step that a piece leads to from this state."""
        key = (state, piece)
        step = self._steps.get(key)
        if step is None:
            if len(self._steps) >= KEPT:
                self._steps.clear()
            step = self._steps[key] = self._read(state, piece)
        return step

    def _read(self, state: State, piece: bytes) -> Step:
        mode, pending, modes, completed = state.mode, state.pending, [state.mode], False
        for i in range(len(piece)):
            text = pending + piece[i : i + 1]
            to = next((to for mark, to in self._marks[mode] if text.endswith(mark)), None)
            completed = completed or to is not None
            if to is None or to == mode:
                pending = self._partial_marker(mode, text)
            else:
                mode, pending = to, b""
                modes.append(mode)
        return Step(tuple(modes), completed, State(mode, pending))

    def _partial_marker(self, mode: str, text: bytes) -> bytes:
        """The longest suffix of the text that may be the beginning of a marker."""
        ends = (text[i:] for i in range(len(text)))
        return next((end for end in ends if any(m != end and m.startswith(end) for m, _ in self._marks[mode])), b"")
