"""Runs the trials of a search, counts what they cost, and checks the remaining budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimtab.evaluate.fluency import Fluency
from trimtab.steering import Steering

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Outcome:
    """One candidate on one prompt: its score, its dose, its cost in tokens, and the fluency of the answer."""

    score: float
    dose: float
    tokens: int
    fluency: Fluency | None = None


Trial = Callable[[Sequence["Steering | None"], Sequence[int], Progress], list[Outcome]]
"""`trial(steerings, prompts, progress)`: the outcome of each (steering, index of a prompt)."""


class Meter:
    """Runs trials, counts their cost, and checks the remaining budget."""

    def __init__(
        self,
        trial: Trial,
        tokens_each: int,
        budget_tokens: int | None,
        budget_seconds: float | None,
        total: int,
        progress: Progress | None,
    ) -> None:
        self._trial, self._each, self._total, self._progress = trial, tokens_each, total, progress
        self._budget_tokens, self._budget_seconds = budget_tokens, budget_seconds
        self._started = time.perf_counter()
        self._reserved = 0
        self.answers = self.tokens = 0

    def reserve(self, rows: int) -> None:
        """Reserve the tokens of this many answers."""
        self._reserved = rows * self._each

    @property
    def seconds_each(self) -> float:
        """The average time per answer so far; 0 before the first one."""
        return (time.perf_counter() - self._started) / self.answers if self.answers else 0.0

    def afford(self, rows: int) -> bool:
        """Whether the budgets allow this many answers, at the average time per answer so far."""
        if self._budget_seconds is not None:
            elapsed = time.perf_counter() - self._started
            if elapsed + rows * self.seconds_each >= self._budget_seconds:
                return False
        return self._budget_tokens is None or self.tokens + rows * self._each + self._reserved <= self._budget_tokens

    def run(self, steerings: Sequence[Steering | None], items: Sequence[int]) -> list[Outcome]:
        """The outcomes of these steerings on the prompts of these indices."""
        outcomes = self._trial(steerings, items, lambda done, _: self._report(self.answers + done))
        self.answers += len(outcomes)
        self.tokens += sum(outcome.tokens for outcome in outcomes)
        return outcomes

    def _report(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, self._total)
