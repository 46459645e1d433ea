"""How one row's next token is chosen: transformers' own processors, with a random generator for each row.

What a row gets doesn't depend on its neighbours, and equals what `lm.generate` gives alone: greedily, or with
`do_sample=True, top_k=0` and the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.transformers import compat
from trimtab.errors import TrimtabError


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy; `top_p` keeps the likeliest tokens that together have this share of the probability.

    Without a seed, samples differ from run to run.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, low, high in (("temperature", self.temperature, 0, 100), ("top_p", self.top_p, 0, 1)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise TrimtabError(f"{name} is a finite number, got {value!r}")
            if not low <= value <= high:
                raise TrimtabError(f"{name} lies between {low} and {high}, got {value!r}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise TrimtabError(f"a seed is a whole number, got {self.seed!r}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def options(self) -> dict[str, Any]:
        """The same, as options of `lm.generate`."""
        if self.greedy:
            return {"do_sample": False}
        top_p = None if self.top_p == 1 else self.top_p
        return {"do_sample": True, "temperature": float(self.temperature), "top_p": top_p, "top_k": 0}


GREEDY = Sampling()


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """While open, torch's random numbers are those of this seed; then the caller's go on as if nothing had been drawn.

    Nothing changes without a seed.
    """
    if seed is None:
        yield
        return
    here = list(range(torch.cuda.device_count())) if device.type == "cuda" else []
    on_mps = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(here):
        try:
            torch.manual_seed(seed)
            yield
        finally:
            if on_mps is not None:
                torch.mps.set_rng_state(on_mps)


class Chooser:
    """Chooses one row's tokens, under the model's generation settings (a repetition penalty, say)."""

    def __init__(self, model: Any, sampling: Sampling, prompt_length: int, device: torch.device) -> None:
        plain = {"temperature": None, "top_p": None, "top_k": None} if sampling.greedy else {}
        self.sampling = sampling
        self.processors = compat.logits_processors(model, {**plain, **sampling.options}, prompt_length, device)
        self.generator: torch.Generator | None = None
        if not sampling.greedy:
            self.generator = torch.Generator(device)
            if sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(sampling.seed)

    @property
    def plain(self) -> bool:
        """Whether it takes the likeliest token of the logits as they are."""
        return self.sampling.greedy and not len(self.processors)

    def choose(self, ids: Tensor, logits: Tensor) -> int:
        """The next token after `ids` `[1, tokens]`, from the logits `[1, vocabulary]`."""
        scores = self.processors(ids, logits.clone()) if len(self.processors) else logits
        if self.generator is None:
            return int(scores.argmax(-1))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))
