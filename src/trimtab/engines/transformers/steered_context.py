"""The context manager that `lm.steered(…)` returns, and checks of its arguments and of the user's decoding loop."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ContextDecorator
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.transformers.session import FirstPass, Session
from trimtab.errors import TrimtabError
from trimtab.steering import Edit, Steering
from trimtab.steering.gates import ALWAYS
from trimtab.steering.steering import check_steering


class SteeredContext(ContextDecorator):
    """The context of `with lm.steered(…):`. It can be entered repeatedly, and warns if it is never entered."""

    def __init__(self, make: Callable[[], AbstractContextManager[Session]]) -> None:
        self._make = make
        self._open: list[AbstractContextManager[Session]] = []
        self._entered = False

    def __enter__(self) -> Session:
        self._entered = True
        context = self._make()
        session = context.__enter__()
        self._open.append(context)
        return session

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.pop().__exit__(*error)

    def __del__(self) -> None:
        if not self._entered and not sys.is_finalizing():
            warnings.warn(
                "lm.steered(…) steers nothing by itself; write with lm.steered(…): and run the model inside",
                RuntimeWarning,
                stacklevel=2,
            )


def steerings_of(steering: Any) -> tuple[Steering, ...]:
    """The steerings passed to `lm.steered`: a single one, or those of a list, without `None`.

    Raises:
        TrimtabError: `steering` is neither a steering nor a non-empty list of steerings and `None`.
    """
    if not isinstance(steering, (list, tuple)):
        check_steering(steering)
        return (steering,)
    if not steering:
        raise TrimtabError(
            "the list of steerings is empty; give one steering for all rows, or a list with one for each (None for an"
            " unsteered row)"
        )
    chosen = tuple(each_steering for each_steering in steering if each_steering is not None)
    for each_steering in chosen:
        check_steering(each_steering)
    return chosen


def parse_prompt_lengths(prompt_lengths: Any) -> list[int] | None:
    """The prompts' lengths in tokens as a list. Raises `TrimtabError` for anything but positive integers."""
    if prompt_lengths is None:
        return None
    listed = prompt_lengths.tolist() if hasattr(prompt_lengths, "tolist") else prompt_lengths
    fits = isinstance(listed, (list, tuple)) and bool(listed)
    if not fits or any(isinstance(n, bool) or not isinstance(n, Integral) or n < 1 for n in listed):
        raise TrimtabError(
            f"prompt_lengths are whole numbers of tokens from 1 up, one for each row, got {prompt_lengths!r}"
        )
    return [int(n) for n in listed]


class UncachedLoopCheck:
    """Detects a decoding loop without a cache, where each pass would be taken for a new prompt, one token longer."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self._matters = any(edit.positions.follows_prompt or edit.gate != ALWAYS for edit in edits)
        self._last: Tensor | None = None

    def check(self, first: FirstPass) -> None:
        """Raise `TrimtabError` if this pass has the texts of the last one with one more token each."""
        ids, last = first.inputs.get("input_ids"), self._last
        self._last = ids if isinstance(ids, Tensor) and ids.dim() == 2 else None
        if not self._matters or self._last is None or last is None or last.device != self._last.device:
            return
        grown = self._last[:, :-1]
        if grown.shape == last.shape and last.shape[1] and torch.equal(grown, last):
            raise TrimtabError(
                f"this pass repeats the {last.shape[1]} tokens of the last one and has one more: is that generated text"
                " (a loop without a cache), or a longer prompt? Say so with lm.steered(…, prompt_lengths=[…])"
            )
