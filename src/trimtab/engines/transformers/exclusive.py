"""Locks that allow one run at a time per model, since all threads and all `LM`s of a model share its hooked modules."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from trimtab.engines.transformers.evaluating import evaluating
from trimtab.errors import TrimtabError
from trimtab.keywords import caller_stacklevel

PATIENCE = 30.0
"""Seconds that a thread waits for another one inside `lm.steered(…)` before it warns."""


@dataclass
class _DecoderLock:
    """The lock of one decoder, and its state."""

    lock: Any = field(default_factory=threading.RLock)
    steered: bool = False
    thread: int | None = None  # the thread that steers
    user_held: bool = False  # whether it is held by lm.steered(…), for an unknown time

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock while the context is open. Warns after a long wait for `lm.steered(…)`, a possible deadlock."""
        acquired = self.lock.acquire(timeout=PATIENCE) if self.user_held else self.lock.acquire()
        if not acquired:
            warnings.warn(
                "waiting for another thread to leave lm.steered(…); if that thread waits for this one, this is a"
                " deadlock: inside the context, only model.generate may run in another thread; lm.generate(…,"
                " steering) needs no context",
                RuntimeWarning,
                stacklevel=caller_stacklevel(),
            )
            self.lock.acquire()
        try:
            yield
        finally:
            self.lock.release()


_locks: WeakKeyDictionary[nn.Module, _DecoderLock] = WeakKeyDictionary()
_eager_lock = threading.Lock()
_eager_runs = 0
_eager_stance: Any = None


def _lock_of(decoder: nn.Module) -> _DecoderLock:
    return _locks.setdefault(decoder, _DecoderLock())


@contextmanager
def reading(decoder: nn.Module) -> Iterator[None]:
    """While open, no other thread steers or reads this decoder, and it is in evaluation mode.

    It may be nested in a steered run of the same thread.
    """
    with _lock_of(decoder).hold(), _eager(), evaluating(decoder):
        yield


@contextmanager
def steering_lock(decoder: nn.Module, *, user_held: bool = False) -> Iterator[None]:
    """While open, no other thread steers or reads this decoder, and it isn't steered a second time.

    `user_held`: the user holds the context for an unknown time, and may wait for other threads inside it.

    Raises:
        TrimtabError: This thread is already steering it.
    """
    decoder_lock = _lock_of(decoder)
    with decoder_lock.hold():
        if decoder_lock.steered:
            raise TrimtabError("this model is being steered already; leave lm.steered(…) first, or add the steerings")
        decoder_lock.steered, decoder_lock.thread, decoder_lock.user_held = True, threading.get_ident(), user_held
        try:
            with _eager():
                yield
        finally:
            decoder_lock.steered, decoder_lock.thread, decoder_lock.user_held = False, None, False


def steered_here(decoder: nn.Module) -> bool:
    """Whether this thread is steering the decoder, through any `LM`, so that activations it reads are steered."""
    decoder_lock = _lock_of(decoder)
    return decoder_lock.steered and decoder_lock.thread == threading.get_ident()


class GenerationGuard:
    """Ensures that one thread at a time generates inside an `lm.steered(…)`, and none when it ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._depth = 0
        self._left = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Mark this thread as generating while the context is open.

        Raises:
            TrimtabError: Another thread is generating, whose steps couldn't be distinguished from this one's; or, at
                the end, `lm.steered(…)` was left in the meantime, so the end of the text isn't steered.
        """
        with self._lock:
            if self._depth and self._thread != threading.get_ident():
                raise TrimtabError(
                    "another thread is generating inside this lm.steered(…) already, and its steps can't be"
                    " distinguished from this one's; generate in one thread, or with lm.generate(…), which takes turns"
                )
            self._thread = threading.get_ident()
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
            if self._left:  # replaces any other error, which was caused by this
                raise TrimtabError(
                    "lm.steered(…) was left while this text was being generated, so its end isn't steered and the text"
                    " is discarded; join the thread that generates before the context ends"
                )

    @contextmanager
    def guard_context(self) -> Iterator[None]:
        """The context for generating. Raises `TrimtabError` if it ends while a thread is still generating."""
        try:
            yield
        finally:
            with self._lock:
                self._left, still = True, self._depth > 0
        if still:
            raise TrimtabError(
                "lm.steered(…) ends while a thread is still generating in it; join the thread inside the context"
            )


def is_steered(decoder: nn.Module) -> bool:
    """Whether this decoder is being steered, by this thread or another."""
    return decoder in _locks and _locks[decoder].steered


@contextmanager
def _eager() -> Iterator[None]:
    """While open, code compiled by `torch.compile` runs eagerly, since compiled graphs don't call hooks.

    The compiler's stance is global to the process, so the last run to end restores it.
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
