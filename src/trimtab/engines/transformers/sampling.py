"""How the rows of a batch choose their tokens: transformers' processors of logits, done for the batch as tensors.

Each row has its own settings and its own random numbers, so that what it gets doesn't depend on its neighbours. What
isn't known here (a processor for bad words, say) is left to transformers, row by row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.drawing import Kept, draw
from trimtab.engines.transformers.grammar import Masks, Matcher
from trimtab.errors import TrimtabError

AHEAD = 64
"""So many of a row's random numbers are on the device at a time."""


@dataclass(frozen=True)
class Sampling:
    """How one row's tokens are chosen. Temperature 0 is greedy.

    `top_p` keeps the likeliest tokens that together have this share of the probability, `top_k` so many of the
    likeliest (0: all), `min_p` what has at least this share of the likeliest token's probability. `repetition_penalty`
    divides the logits of tokens that have come before; `None` leaves it to the model's generation settings. Without a
    seed, samples differ from run to run.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        limits: list[tuple[str, float, float, float]] = [
            ("temperature", self.temperature, 0, 100),
            ("top_p", self.top_p, 0, 1),
            ("min_p", self.min_p, 0, 1),
        ]
        if self.repetition_penalty is not None:
            limits.append(("repetition_penalty", self.repetition_penalty, 0.01, 100))
        for name, value, low, high in limits:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise TrimtabError(f"{name} is a finite number, got {value!r}")
            if not low <= value <= high:
                raise TrimtabError(f"{name} lies between {low} and {high}, got {value!r}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise TrimtabError(f"top_k is a whole number from 0, got {self.top_k!r}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise TrimtabError(f"a seed is a whole number, got {self.seed!r}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def options(self) -> dict[str, Any]:
        """The same, as options of `lm.generate`."""
        more = {} if self.repetition_penalty is None else {"repetition_penalty": float(self.repetition_penalty)}
        if self.greedy:
            return {"do_sample": False, **more}
        return {
            "do_sample": True,
            "temperature": float(self.temperature),
            "top_p": None if self.top_p == 1 else self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p or None,
            **more,
        }


GREEDY = Sampling()
PLAIN = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
"""Options of `generate` by which the likeliest token is taken, whatever the model's settings say of sampling."""


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


def seed_of(seed: int, answer: int) -> int:
    """The seed of one of several answers that are asked for with one seed; the first one's is the seed itself."""
    if answer == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{answer}".encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Settings:
    """What is done to one row's logits, in this order. With `others`, these processors do all of it."""

    sampled: bool
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    ends: tuple[int, ...] = ()  # the tokens that `min_new_tokens` keeps away
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    others: Any = None

    @classmethod
    def of(cls, model: Any, options: Mapping[str, Any], prompt_length: int, device: torch.device) -> Settings:
        """From options of `generate`, and the model's own settings of generation."""
        processors = compat.logits_processors(model, options, prompt_length, device)
        found = compat.processor_settings(processors)
        sampled = bool(options["do_sample"])
        return cls(sampled, others=processors) if found is None else cls(sampled, **found)

    @property
    def filters(self) -> bool:
        """Whether some tokens are left out before one is drawn."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0


class RowSampler:
    """One row's settings, and its random numbers: one for each token, the same on every device.

    `matcher` is how far its answer has come in its grammar, where it has one; the tokens are told to it as they come.
    """

    def __init__(self, settings: Settings, seed: int | None, tokens: int, matcher: Matcher | None = None) -> None:
        self.settings = settings
        self.matcher = matcher
        self.numbers: Tensor | None = None
        if settings.sampled:
            generator = torch.Generator()
            if seed is None:
                generator.seed()
            else:
                generator.manual_seed(seed)
            self.numbers = torch.rand(tokens, generator=generator)

    def ahead(self, token: int) -> Tensor:
        """The random numbers `[AHEAD]` from this token of the answer on; zeros behind its end, and where none are."""
        found = torch.zeros(AHEAD)
        if self.numbers is not None:
            numbers = self.numbers[token : token + AHEAD]
            found[: len(numbers)] = numbers
        return found


class BatchSampler:
    """How these rows choose their tokens, for as long as the batch stays the same. The host waits for nothing.

    Args:
        rows: Each row's settings and numbers.
        prompts: Each row's prompt.
        answers: Each row's tokens so far, which whoever calls `choose` goes on with.
        device: Where the logits are.
    """

    def __init__(
        self,
        rows: Sequence[RowSampler],
        prompts: Sequence[Sequence[int]],
        answers: Sequence[list[int]],
        device: torch.device,
    ) -> None:
        self.rows, self.prompts, self.answers, self.device = list(rows), prompts, answers, device
        every = [row.settings for row in rows]
        self._apart = [i for i, one in enumerate(every) if one.others]
        self._sampled = _Some([one.sampled for one in every], device)
        picked = [one for one in every if one.sampled]
        self._filtered = _Some([one.filters for one in picked], device)
        self._hot = any(one.temperature != 1 for one in picked)
        self._temperatures = torch.tensor([[one.temperature] for one in picked], device=device) if self._hot else None
        self._kept: Kept | None = None
        self._limits = [(one.top_k, one.top_p, one.min_p) for one in picked if one.filters]
        self._penalties: Tensor | None = None
        self._seen: Tensor | None = None
        if any(one.repetition_penalty != 1 for one in every):
            self._penalties = torch.tensor([[one.repetition_penalty] for one in every], device=device)
        self._constrained = any(row.matcher is not None for row in rows)
        self._masks: Masks | None = None
        self._steps = 0  # since the numbers on the device were put there
        self._numbers = self._numbers_ahead() if picked else None
        self._early = any(len(tokens) < one.min_new_tokens for one, tokens in zip(every, answers, strict=True))
        self._ends = self._missing = None
        if self._early:
            ends = sorted({end for one in every for end in one.ends})
            self._ends = torch.tensor(ends, device=device)
            missing = [one.min_new_tokens - len(tokens) for one, tokens in zip(every, answers, strict=True)]
            of = [[n if end in one.ends else 0 for end in ends] for one, n in zip(every, missing, strict=True)]
            self._missing = torch.tensor(of, device=device)  # [rows, ends]: for how many tokens an end is kept away

    def choose(self, logits: Tensor) -> Tensor:
        """The next tokens `[rows]`, by logits `[rows, vocabulary]`, which are left as they are."""
        scores = self._processed(logits)
        best = scores.argmax(-1)
        tokens = best
        if self._numbers is not None:
            tokens = self._sampled.put(best, self._draw(self._sampled.take(scores), self._sampled.take(best)))
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        if self._masks is not None:
            self._masks.advance()
        return tokens

    def _processed(self, logits: Tensor) -> Tensor:
        scores = logits
        if self._penalties is not None:
            seen = self._seen_in(logits)
            scores = torch.where(
                seen, torch.where(logits < 0, logits * self._penalties, logits / self._penalties), logits
            )
        if self._ends is not None and self._missing is not None:
            scores = scores.clone() if scores is logits else scores
            scores[:, self._ends] = scores[:, self._ends].masked_fill(self._missing > 0, -torch.inf)
            self._missing = self._missing - 1
        if self._apart:
            scores = scores.clone() if scores is logits else scores
            for i in self._apart:
                ids = torch.tensor([[*self.prompts[i], *self.answers[i]]], device=self.device)
                scores[i : i + 1] = self.rows[i].settings.others(ids, logits[i : i + 1].clone())
        if self._constrained:  # last: what a grammar forbids, nothing brings back
            if self._masks is None:
                self._masks = Masks([row.matcher for row in self.rows], logits.shape[-1], self.device)
            scores = self._masks.apply(scores)
        return scores

    def _draw(self, scores: Tensor, best: Tensor) -> Tensor:
        if self._temperatures is not None:
            scores = scores / self._temperatures
        weights = scores.softmax(-1)
        if self._limits:
            if self._kept is None:
                size = weights.shape[-1]
                limits = [(size if k is None else min(k, size), p, least) for k, p, least in self._limits]
                self._kept = Kept.of(limits, self.device)
            some = self._filtered.take(weights)
            weights = self._filtered.put(weights, some * (some >= self._kept.least(some)))
        if self._steps == AHEAD:
            self._numbers, self._steps = self._numbers_ahead(), 0
        assert self._numbers is not None
        numbers = self._numbers[:, self._steps, None]
        self._steps += 1
        return draw(weights, numbers, best[:, None])[:, 0]

    def _numbers_ahead(self) -> Tensor:
        pairs = zip(self.rows, self.answers, strict=True)
        numbers = [row.ahead(len(tokens)) for row, tokens in pairs if row.settings.sampled]
        return torch.stack(numbers).to(self.device)

    def _seen_in(self, logits: Tensor) -> Tensor:
        """`[rows, vocabulary]`: which tokens have come before, where that is penalized."""
        if self._seen is None:
            size = logits.shape[-1]
            seen = self._seen = torch.zeros(logits.shape, dtype=torch.bool, device=self.device)
            for i, (row, prompt, answer) in enumerate(zip(self.rows, self.prompts, self.answers, strict=True)):
                if row.settings.repetition_penalty != 1:
                    ids = [token for token in {*prompt, *answer} if token < size]
                    seen[i, torch.tensor(ids, dtype=torch.long, device=self.device)] = True
        return self._seen


class _Some:
    """Some rows of a batch: all are taken without a copy."""

    def __init__(self, chosen: Sequence[bool], device: torch.device) -> None:
        self.every = all(chosen)
        rows = [i for i, one in enumerate(chosen) if one]
        self.rows = torch.tensor(rows, dtype=torch.long, device=device)

    def take(self, x: Tensor) -> Tensor:
        """These rows."""
        return x if self.every else x.index_select(0, self.rows)

    def put(self, x: Tensor, some: Tensor) -> Tensor:
        """The batch, and in it these rows as they are here."""
        return some if self.every else x.index_copy(0, self.rows, some)
