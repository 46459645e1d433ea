"""Finds the strengths at which a steering has given divergences in nats, several at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.evaluate.divergence import Divergence, Reference, divergence, reference
from trimtab.steering import Steering
from trimtab.tune.nats import check_reached, find_factor, monotone

if TYPE_CHECKING:
    from trimtab.bench.tasks import Task
    from trimtab.lm import LM

CLOSE = 0.1
"""Tolerance: a divergence this close to the requested one, as a share of it, is close enough to compare methods."""
TOKENS = 16

Steerings = Steering | Sequence[Steering]
"""One steering for all prompts, or one for each."""


@dataclass(frozen=True)
class Dose:
    """A strength: the factor of the steering, and the divergence that it then has (95th percentile, mean)."""

    nats: float
    factor: float
    reached: float
    mean: float


def base_of(lm: LM, task: Task) -> Reference:
    """The reference for a task's divergences: unsteered answers to prompts like its items."""
    return reference(lm, list(task.reference_prompts), tokens=TOKENS)


class Doses:
    """Finds strengths of one steering; divergences that have been measured are reused."""

    def __init__(self, lm: LM, base: Reference, steering: Steerings) -> None:
        self._lm, self._base, self._steering = lm, base, steering
        self._seen: dict[float, Divergence] = {}

    def divergence_at(self, factor: float) -> float:
        """The 95th percentile of the divergence at this multiple of the steering."""
        if factor not in self._seen:
            self._seen[factor] = divergence(self._lm, scaled(self._steering, factor), self._base)
        return self._seen[factor].p95

    def at(self, nats: float) -> Dose:
        """The strength that reaches a divergence. Raises `TrimtabError` if no strength comes close."""
        factor = find_factor(self.divergence_at, nats, CLOSE)
        reached = self._seen[factor]
        check_reached(nats, factor, reached.p95)
        return Dose(nats, factor, reached.p95, reached.mean)

    @property
    def measured(self) -> int:
        """The number of strengths at which the divergence was measured."""
        return len(self._seen)

    @property
    def monotone(self) -> bool:
        """Whether no stronger steering that was tried changed the model clearly less than a weaker one."""
        return monotone(sorted((factor, seen.p95) for factor, seen in self._seen.items()))


def scaled(steering: Steerings, factor: float) -> Steerings:
    """The steering, or each of several, times a factor."""
    return (
        factor * steering if isinstance(steering, Steering) else [factor * each_steering for each_steering in steering]
    )
