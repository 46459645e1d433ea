"""The strengths at which a steering takes the model so many nats from itself, several at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.errors import TrimtabError
from trimtab.evaluate.divergence import Divergence, Reference, divergence, reference
from trimtab.steering import Steering
from trimtab.tune.nats import factor_at, monotone

if TYPE_CHECKING:
    from trimtab.bench.tasks import Task
    from trimtab.lm import LM

CLOSE = 0.1
"""So near to the requested divergence, as a share of it, is near enough to compare methods by."""
TOKENS = 16

Steered = Steering | Sequence[Steering]
"""One steering for all prompts, or one for each."""


@dataclass(frozen=True)
class Dose:
    """A strength: what the steering is multiplied by, and the divergence that it then has (95th percentile, mean)."""

    nats: float
    factor: float
    reached: float
    mean: float


def base_of(lm: LM, task: Task) -> Reference:
    """What a task's divergences are measured from: unsteered answers to prompts like its items."""
    return reference(lm, list(task.reference_prompts), tokens=TOKENS)


class Doses:
    """Finds strengths of one steering; what has been measured once isn't measured again."""

    def __init__(self, lm: LM, base: Reference, steering: Steered) -> None:
        self._lm, self._base, self._steering = lm, base, steering
        self._seen: dict[float, Divergence] = {}

    def far(self, factor: float) -> float:
        """The 95th percentile of the divergence at so many times the steering."""
        if factor not in self._seen:
            self._seen[factor] = divergence(self._lm, scaled(self._steering, factor), self._base)
        return self._seen[factor].p95

    def at(self, nats: float) -> Dose:
        """The strength for a divergence. Raises `TrimtabError` where none comes near it."""
        factor = factor_at(self.far, nats, CLOSE)
        reached = self._seen[factor]
        if abs(reached.p95 - nats) > 0.25 * nats:
            raise TrimtabError(
                f"its divergence jumps over {nats:g} nats: the nearest is {reached.p95:.2g}, at {factor:.3g} times it"
            )
        return Dose(nats, factor, reached.p95, reached.mean)

    @property
    def measured(self) -> int:
        """At how many strengths the divergence was measured."""
        return len(self._seen)

    @property
    def monotone(self) -> bool:
        """Whether no stronger steering that was tried changed the model clearly less than a weaker one."""
        return monotone(sorted((factor, seen.p95) for factor, seen in self._seen.items()))


def scaled(steering: Steered, factor: float) -> Steered:
    """So many times the steering, or each of them."""
    return (
        factor * steering if isinstance(steering, Steering) else [factor * each_steering for each_steering in steering]
    )
