"""One run at a time over one model: hooks sit on the modules, which all threads and all `LM`s over a model share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from trimtab.errors import TrimtabError


@dataclass
class _Turn:
    """Whose turn it is on one decoder."""

    lock: Any = field(default_factory=threading.RLock)
    steered: bool = False


_turns: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()
_eager_lock = threading.Lock()
_eager_runs = 0
_eager_stance: Any = None


def _turn(decoder: nn.Module) -> _Turn:
    return _turns.setdefault(decoder, _Turn())


@contextmanager
def reading(decoder: nn.Module) -> Iterator[None]:
    """While open, no other thread steers or reads this decoder. A steered run of the same thread may read."""
    with _turn(decoder).lock, _eager():
        yield


@contextmanager
def steering(decoder: nn.Module) -> Iterator[None]:
    """While open, no other thread steers or reads this decoder, and it isn't steered a second time.

    Raises:
        TrimtabError: This thread is steering it already.
    """
    turn = _turn(decoder)
    with turn.lock:
        if turn.steered:
            raise TrimtabError("this model is being steered already; leave lm.steered(…) first, or add the steerings")
        turn.steered = True
        try:
            with _eager():
                yield
        finally:
            turn.steered = False


def steers(decoder: nn.Module) -> bool:
    """Whether this decoder is being steered, by this thread or another."""
    return decoder in _turns and _turns[decoder].steered


@contextmanager
def _eager() -> Iterator[None]:
    """While open, what `torch.compile` has made runs as plain Python: a compiled graph doesn't call hooks.

    The compiler knows one such stance for the whole process, so the last run to end takes it back.
    """
    global _eager_runs, _eager_stance
    with _eager_lock:
        _eager_runs += 1
        if _eager_runs == 1:
            _eager_stance = torch.compiler.set_stance("force_eager")
            _eager_stance.__enter__()
    try:
        yield
    finally:
        with _eager_lock:
            _eager_runs -= 1
            if not _eager_runs:
                _eager_stance.__exit__(None, None, None)
                _eager_stance = None
