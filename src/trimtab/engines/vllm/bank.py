"""The bank of additions: one row per state and layer, and for each token the index of its row."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.engines.vllm.program import State
from trimtab.errors import TrimtabError
from trimtab.steering import Site

EMPTY_SLOT = 0
"""The slot of tokens to which nothing is added: its rows are negative zeros, and `x + -0.0` is `x` bit for bit."""


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to the device; to a GPU from pinned memory, so that the host doesn't wait."""
    return _pinned(x, device).to(device, non_blocking=True)


def copy_to(x: Tensor, to: Tensor) -> None:
    """Copy a tensor from the host into an existing tensor in the same way."""
    to.copy_(_pinned(x, to.device), non_blocking=True)


def _pinned(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory() if device.type == "cuda" and torch.cuda.is_available() else x


class Slots:
    """Assigns slots to states, counting from 1. A state without users keeps its slot until another state needs it."""

    def __init__(self, capacity: int, setting: str = "TRIMTAB_SLOTS") -> None:
        self.capacity, self._setting = capacity, setting
        self._free = list(range(capacity - 1, EMPTY_SLOT, -1))
        self._slot: dict[str, int] = {}
        self._users: dict[str, int] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()

    def acquire(self, key: str) -> tuple[int, bool]:
        """Add a user to a state. Returns the state's slot, and whether it is new and must be written.

        Raises `TrimtabError` if no slot is free.
        """
        if key in self._slot:
            self._users[key] = self._users.get(key, 0) + 1
            self._idle.pop(key, None)
            return self._slot[key], False
        if not self._free and self._idle:
            oldest, _ = self._idle.popitem(last=False)
            self._free.append(self._slot.pop(oldest))
        if not self._free:
            raise TrimtabError(f"all {self.capacity - 1} slots for steerings are in use; raise {self._setting}")
        self._slot[key] = self._free.pop()
        self._users[key] = 1
        return self._slot[key], True

    def release(self, key: str) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self._idle[key] = None

    def __getitem__(self, key: str) -> int:
        return self._slot[key]

    @property
    def used(self) -> int:
        return len(self._users)


class Bank:
    """The additions after blocks: `rows[site]` is `[slots, width]` on the model's device, in its dtype.

    `index` is `[tokens]`, the slot of each token. Both keep their addresses, so that captured graphs read what was
    written there last.
    """

    def __init__(
        self, layers: Sequence[int], width: int, capacity: int, tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots: Slots = Slots(capacity)
        self._all = torch.full((len(layers), capacity, width), -0.0, dtype=dtype, device=device)
        self.rows: dict[Site, Tensor] = dict(zip(map(Site, layers), self._all.unbind(), strict=True))  # views
        self.index: Tensor = torch.zeros(tokens, dtype=torch.long, device=device)

    def acquire(self, state: State) -> None:
        """Add a user to a state. If its rows aren't in the bank yet, they are written in one copy."""
        slot, new = self.slots.acquire(state.key)
        if not new:
            return
        rows = torch.full((len(self.rows), self._all.shape[-1]), -0.0, dtype=self._all.dtype)
        for i, site in enumerate(self.rows):
            if site in state.added:
                rows[i] = state.row(site, rows.dtype)
        copy_to(rows, self._all[:, slot])

    def release(self, state: State) -> None:
        self.slots.release(state.key)


class IndexBuffer:
    """The contents of a captured graph's index, `[tokens]`: a step's slots at the start, and `EMPTY_SLOT` after
    them.
    """

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self._length = 0

    def fill(self, slots: Tensor) -> None:
        """Write the slots of a step's first tokens, given on the host; all other tokens get `EMPTY_SLOT`."""
        length = max(self._length, len(slots))
        if length:
            copy_to(torch.nn.functional.pad(slots, (0, length - len(slots)), value=EMPTY_SLOT), self.index[:length])
        self._length = len(slots)
