"""Choose the next token from its logits: greedy, or sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trimtab.errors import TrimtabError, UnsupportedError


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. `temperature=None` is greedy; `top_k=0` and `top_p=1` keep all tokens."""

    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()

    def pick(self, logits: np.ndarray, generator: torch.Generator) -> int:
        """Choose a token, given logits `[vocabulary]`."""
        if self.temperature is None:
            return int(logits.argmax())
        scores = torch.from_numpy(logits).double() / self.temperature
        order = torch.argsort(scores, descending=True, stable=True)
        order = order[: self.top_k] if self.top_k else order
        shares = torch.softmax(scores[order], -1)
        keep = int((shares.cumsum(-1) - shares < self.top_p).sum())  # the fewest whose probabilities add up to top_p
        return int(order[torch.multinomial(shares[: max(1, keep)], 1, generator=generator)])


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """The sampling settings that `generate`'s options specify.

    Raises `TrimtabError` for invalid values, and `UnsupportedError` for options that this engine doesn't have.
    """
    known = {"do_sample", "temperature", "top_k", "top_p", "stop_strings"}
    if unknown := sorted(name for name, value in options.items() if name not in known and value is not None):
        raise UnsupportedError(f"the llamacpp engine has no option {unknown[0]!r}; it has {', '.join(sorted(known))}")
    stop = options.get("stop_strings") or ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not text for text in stops):
        raise TrimtabError("a stop string is empty")
    if not options.get("do_sample"):
        return Sampling(stop_strings=stops)
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    values |= {name: options[name] for name in values if options.get(name) is not None}
    if not (math.isfinite(values["temperature"]) and values["temperature"] > 0):
        raise TrimtabError(f"a temperature is a number above 0, got {values['temperature']}")
    if values["top_k"] < 0 or not 0 < values["top_p"] <= 1:
        raise TrimtabError(f"top_k is at least 0 and top_p in (0, 1], got {values['top_k']} and {values['top_p']}")
    return Sampling(float(values["temperature"]), int(values["top_k"]), float(values["top_p"]), stops)
