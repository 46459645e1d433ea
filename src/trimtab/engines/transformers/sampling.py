"""Token selection for the rows of a batch: transformers' logits processors, vectorized over the batch.

Each row has its own settings and random numbers, so its tokens don't depend on the other rows. Processors that aren't
implemented here (such as the one for bad words) are run by transformers, row by row.
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
from trimtab.engines.transformers.drawing import SamplingLimits, draw
from trimtab.engines.transformers.grammar import Masks, Matcher
from trimtab.errors import TrimtabError

NUMBERS_ON_DEVICE = 64
"""The number of each row's random numbers that are on the device at a time."""
KEPT_PATTERNS = 64
"""The number of row selections of a batch whose prepared tensors are cached."""


@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of one row. Temperature 0 is greedy.

    `top_p` keeps the most likely tokens whose probabilities add up to this share, `top_k` this number of the most
    likely tokens (0: all), and `min_p` the tokens with at least this share of the most likely token's probability.
    `repetition_penalty` lowers the logits of tokens that have occurred before: positive ones are divided by it,
    negative ones multiplied; `None` uses the model's generation configuration. Without a seed, samples differ from run
    to run.
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
            raise TrimtabError(f"top_k is a whole number from 0 up, got {self.top_k!r}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise TrimtabError(f"a seed is a whole number, got {self.seed!r}")

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy."""
        return self.temperature == 0

    @property
    def options(self) -> dict[str, Any]:
        """The parameters as options of `lm.generate`, without the seed."""
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
PLAIN: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
"""Options of `generate` for greedy decoding that override the model's generation configuration."""


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed torch's random number generators within the context, and restore the caller's states afterwards.

    Without a seed it has no effect.
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
    """The seed of one of several answers that share a request's seed; the first answer uses the seed itself."""
    if answer == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{answer}".encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Settings:
    """The processing of one row's logits, in the order of the fields. If `fallback_processors` is set, it does all of
    it.
    """

    sampled: bool
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    ends: tuple[int, ...] = ()  # the tokens that `min_new_tokens` forbids
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    fallback_processors: Any = None

    @classmethod
    def of(cls, model: Any, options: Mapping[str, Any], prompt_length: int, device: torch.device) -> Settings:
        """The settings for options of `generate` and the model's generation configuration."""
        processors = compat.logits_processors(model, options, prompt_length, device)
        settings = compat.processor_settings(processors)
        sampled = bool(options["do_sample"])
        return cls(sampled, fallback_processors=processors) if settings is None else cls(sampled, **settings)

    @property
    def filters(self) -> bool:
        """Whether sampling excludes some tokens (`top_k`, `top_p` or `min_p`)."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0


class RowSampler:
    """One row's settings and its random numbers: one for each token, the same on every device.

    `matcher` tracks the answer's position in its grammar, if it has one; it advances with each token.
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

    def next_numbers(self, token: int) -> Tensor:
        """The random numbers `[AHEAD]` from this token of the answer on; zeros after its end or for greedy rows."""
        padded = torch.zeros(NUMBERS_ON_DEVICE)
        if self.numbers is not None:
            numbers = self.numbers[token : token + NUMBERS_ON_DEVICE]
            padded[: len(numbers)] = numbers
        return padded


class BatchSampler:
    """Chooses tokens for a batch whose rows don't change, without device synchronization.

    `choose` does all of it. Verification does it in steps: `processed` gives the logits, `warped` the scores to sample
    from, `draw` the tokens, and `advance` is called once each row's token is known. These methods take `rows`: the
    batch row of each row of logits, possibly with repetitions; `None` means all rows of the batch in order.

    Args:
        rows: The sampler of each row.
        prompts: The prompt of each row.
        answers: Each row's tokens so far. The caller of `advance` appends to them.
        device: The device of the logits.
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
        self._every = tuple(range(len(self.rows)))
        self._selections: dict[tuple[int, ...] | None, _RowSelection] = {}
        self._batch = self._selection(None)
        self._temperatures = self._column([row_settings.temperature for row_settings in every], 1)
        self._token_limits: SamplingLimits | None = None
        self._penalties = self._column([row_settings.repetition_penalty for row_settings in every], 1)
        self._seen: Tensor | None = None
        self._constrained = any(row.matcher is not None for row in rows)
        self._masks: Masks | None = None
        self._steps = 0  # since the random numbers on the device were copied
        self._numbers = self._numbers_ahead() if any(row_settings.sampled for row_settings in every) else None
        self._ends = self._forbidden_steps = None
        if any(len(tokens) < row_settings.min_new_tokens for row_settings, tokens in zip(every, answers, strict=True)):
            ends = sorted({end for row_settings in every for end in row_settings.ends})
            self._ends = torch.tensor(ends, device=device)
            missing = [
                row_settings.min_new_tokens - len(tokens) for row_settings, tokens in zip(every, answers, strict=True)
            ]
            of = [
                [n if end in row_settings.ends else 0 for end in ends]
                for row_settings, n in zip(every, missing, strict=True)
            ]
            # [rows, ends]: the number of tokens for which an end stays forbidden
            self._forbidden_steps = torch.tensor(of, device=device)

    def choose(self, logits: Tensor) -> Tensor:
        """The next tokens `[rows]` for logits `[rows, vocabulary]`, which aren't modified."""
        tokens = self.select_tokens(self.processed(logits))
        self.advance(tokens)
        return tokens

    def processed(self, logits: Tensor, rows: tuple[int, ...] | None = None) -> Tensor:
        """The logits with penalties applied, and `-inf` for forbidden tokens. `logits` itself isn't modified."""
        picked, scores = self._selection(rows), logits
        if self._penalties is not None:
            seen, penalties = picked.select(self._occurred_tokens(logits.shape[-1])), picked.select(self._penalties)
            scores = torch.where(seen, torch.where(logits < 0, logits * penalties, logits / penalties), logits)
        if self._ends is not None and self._forbidden_steps is not None:
            scores = scores.clone() if scores is logits else scores
            missing = picked.select(self._forbidden_steps)
            scores[:, self._ends] = scores[:, self._ends].masked_fill(missing > 0, -torch.inf)
        if picked.fallback_rows:
            scores = scores.clone() if scores is logits else scores
            for i, row in picked.fallback_rows:
                ids = torch.tensor([[*self.prompts[row], *self.answers[row]]], device=self.device)
                scores[i : i + 1] = self.rows[row].settings.fallback_processors(ids, logits[i : i + 1].clone())
        if self._constrained:  # last, so that no processor re-allows forbidden tokens
            if self._masks is None:
                self._masks = Masks([row.matcher for row in self.rows], logits.shape[-1], self.device)
            scores = self._masks.apply(scores, rows)
        return scores

    def select_tokens(self, scores: Tensor) -> Tensor:
        """The next tokens `[rows]` for processed scores: the most likely ones, or samples."""
        best = scores.argmax(-1)
        sampled = self._batch.sampled
        if not sampled:
            return best
        weights = self._weights(sampled.take(scores), self._batch)
        return sampled.put(best, draw(weights, sampled.take(self._number()), sampled.take(best)[:, None])[:, 0])

    def warped(self, scores: Tensor, rows: tuple[int, ...] | None = None) -> Tensor:
        """The scores to choose tokens by: for sampled rows log-weights after filtering, for others unchanged."""
        picked = self._selection(rows)
        if not picked.sampled:
            return scores
        return picked.sampled.put(scores, self._weights(picked.sampled.take(scores), picked).log())

    def any_sampled(self, rows: tuple[int, ...] | None = None) -> bool:
        """Whether any of these rows is sampled."""
        return bool(self._selection(rows).sampled)

    def draw(self, warped: Tensor, best: Tensor, rows: tuple[int, ...] | None = None) -> Tensor:
        """Tokens `[rows]` for warped scores: `best` for greedy rows, samples for the others."""
        picked = self._selection(rows)
        sampled = picked.sampled
        if not sampled:
            return best
        weights, numbers = sampled.take(warped).softmax(-1), sampled.take(picked.select(self._number()))
        return sampled.put(best, draw(weights, numbers, sampled.take(best)[:, None])[:, 0])

    def advance(self, tokens: Tensor) -> None:
        """Update the state of all rows with their chosen tokens `[rows]`."""
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        if self._forbidden_steps is not None:
            self._forbidden_steps = self._forbidden_steps - 1
        if self._masks is not None:
            self._masks.advance()
        self._steps += 1

    def _weights(self, scores: Tensor, picked: _RowSelection) -> Tensor:
        """The sampling weights `[sampled rows, vocabulary]`, not normalized; 0 for excluded tokens."""
        if self._temperatures is not None:
            scores = scores / picked.sampled.take(picked.select(self._temperatures))
        weights = scores.softmax(-1)
        if picked.filtered:
            some = picked.filtered.take(weights)
            kept = self._limits(weights.shape[-1])
            least = kept.select(picked.filters).min_kept_probability(some)
            weights = picked.filtered.put(weights, some * (some >= least))
        return weights

    def _limits(self, size: int) -> SamplingLimits:
        if self._token_limits is None:
            every = [row.settings for row in self.rows]
            limits = [
                (
                    size if row_settings.top_k is None else min(row_settings.top_k, size),
                    row_settings.top_p,
                    row_settings.min_p,
                )
                for row_settings in every
            ]
            self._token_limits = SamplingLimits.of(limits, self.device)
        return self._token_limits

    def _column(self, values: Sequence[float], nothing: float) -> Tensor | None:
        """The values `[rows, 1]` on the device; `None` if all of them equal `nothing`."""
        return torch.tensor(values, device=self.device)[:, None] if any(x != nothing for x in values) else None

    def _number(self) -> Tensor:
        """Each row's random number `[rows, 1]` for the current token."""
        if self._steps == NUMBERS_ON_DEVICE:
            self._numbers, self._steps = self._numbers_ahead(), 0
        assert self._numbers is not None
        return self._numbers[:, self._steps, None]

    def _numbers_ahead(self) -> Tensor:
        pairs = zip(self.rows, self.answers, strict=True)
        return torch.stack([row.next_numbers(len(tokens)) for row, tokens in pairs]).to(self.device)

    def _occurred_tokens(self, size: int) -> Tensor:
        """`[rows, vocabulary]`: which tokens have occurred, for rows with a repetition penalty."""
        if self._seen is None:
            seen = self._seen = torch.zeros(len(self.rows), size, dtype=torch.bool, device=self.device)
            for i, (row, prompt, answer) in enumerate(zip(self.rows, self.prompts, self.answers, strict=True)):
                if row.settings.repetition_penalty != 1:
                    ids = [token for token in {*prompt, *answer} if token < size]
                    seen[i, torch.tensor(ids, dtype=torch.long, device=self.device)] = True
        return self._seen

    def _selection(self, rows: tuple[int, ...] | None) -> _RowSelection:
        """The cached tensors for a selection of the batch's rows; the same selections recur."""
        rows = None if rows == self._every else rows
        if rows not in self._selections:
            if len(self._selections) >= KEPT_PATTERNS:
                self._selections.clear()
            self._selections[rows] = _RowSelection([row.settings for row in self.rows], rows, self.device)
        return self._selections[rows]


class _RowSelection:
    """A selection of a batch's rows, in this order and possibly with repetitions; `None`: all rows."""

    def __init__(self, every: Sequence[Settings], rows: tuple[int, ...] | None, device: torch.device) -> None:
        numbers = range(len(every)) if rows is None else rows
        settings = [every[row] for row in numbers]
        self.index = None if rows is None else torch.tensor(rows, dtype=torch.long, device=device)
        self.fallback_rows = [(i, row) for i, row in enumerate(numbers) if every[row].fallback_processors]
        self.sampled = _RowSubset([row_settings.sampled for row_settings in settings], device)
        self.filtered = _RowSubset([row_settings.filters for row_settings in settings if row_settings.sampled], device)
        filters = [row for row in numbers if every[row].sampled and every[row].filters]
        self.filters = torch.tensor(filters, dtype=torch.long, device=device)  # indices in the batch

    def select(self, x: Tensor) -> Tensor:
        """Select these rows of a tensor with one entry per row of the batch."""
        return x if self.index is None else x.index_select(0, self.index)


class _RowSubset:
    """A subset of rows, true if it isn't empty. A subset of all rows is taken without a copy."""

    def __init__(self, chosen: Sequence[bool], device: torch.device) -> None:
        rows = [i for i, is_chosen in enumerate(chosen) if is_chosen]
        self.every, self.any = all(chosen), bool(rows)
        self.rows = torch.tensor(rows, dtype=torch.long, device=device)

    def __bool__(self) -> bool:
        return self.any

    def take(self, x: Tensor) -> Tensor:
        return x if self.every else x.index_select(0, self.rows)

    def put(self, x: Tensor, some: Tensor) -> Tensor:
        """`x` with these rows replaced by `some`."""
        return some if self.every else x.index_copy(0, self.rows, some)
