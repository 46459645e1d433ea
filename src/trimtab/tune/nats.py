"""Finds the strength at which a steering has a given divergence in nats, without generating under it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.errors import TrimtabError
from trimtab.evaluate.divergence import TOKENS, Divergence, Reference, divergence, reference
from trimtab.keywords import caller_stacklevel, keywords
from trimtab.steering import Steering
from trimtab.text.chat import Prompt, Template

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM

CLOSE = 0.02
"""Tolerance: a divergence this close to the requested one, as a share of it, is accepted."""
HALVINGS = 24
MIN_FACTOR, MAX_FACTOR = 2.0**-16, 2.0**16
"""The smallest and the largest factor that are tried."""
BELOW = 3
"""This many doublings of the strength below the chosen one are measured, to detect a divergence that falls."""
FAR = 0.25
"""A divergence that differs from the requested one by more than this share of it is a different one: an error."""
FALLS = 0.9
"""A divergence below this share of the divergence at a weaker strength counts as a fall."""


class NotMonotoneWarning(UserWarning):
    """Among the strengths that were tried, a stronger steering changes the model less than a weaker one."""


class InexactWarning(UserWarning):
    """No strength was found at which a steering has just the requested divergence."""


@dataclass(frozen=True)
class AtNats:
    """`steering` is `factor` times the steering passed in; `divergence.p95` is the divergence that was requested,
    within 2 % unless there was an `InexactWarning`.

    `tried` holds the factors that were measured with their 95th percentiles, weakest first. `monotone` says whether
    these grow with the factor; if they don't, another strength may have the same divergence.
    """

    steering: Steering
    factor: float
    divergence: Divergence
    tried: tuple[tuple[float, float], ...]

    @property
    def monotone(self) -> bool:
        """Whether no stronger steering that was tried changed the model clearly less than a weaker one."""
        return monotone(self.tried)


@keywords
def at_nats(
    lm: LM,
    steering: Steering,
    nats: float,
    prompts: Prompt | Sequence[Prompt] | Reference,
    *,
    tokens: int = TOKENS,
    system: str | None = None,
    chat: bool | None = None,
    template: Template | None = None,
    transfer: bool = False,
) -> AtNats:
    """Scale a steering so that the 95th percentile of its divergence from the unsteered model is this many nats.

    The strength is doubled, starting from weak ones, up to the first that reaches the divergence; then the interval is
    narrowed. If the divergence doesn't grow with the strength, the weakest strength that was found to reach it is used,
    with a warning.

    Args:
        lm: A model on an engine that returns all tokens' probabilities: transformers or llamacpp.
        steering: Its edits keep their relative strengths, and their signs.
        nats: 0.25 is hardly noticeable, 1 a clear change, 4 a strong one.
        prompts: The prompts to measure on, or a `reference` made from them.
        tokens: The maximum number of tokens of each unsteered answer.
        system: A system message before each prompt.
        chat: Whether a string is the user's message or plain text; `None` asks the tokenizer.
        template: Keywords of the chat template.
        transfer: Allow a steering learned on another model of the same width.

    Raises:
        TrimtabError: `nats` isn't a positive number, or no strength reaches it on these prompts (the message says how
            far the strongest went), or the divergence jumps over it and isn't within 25 % of it on either side.

    Warns:
        InexactWarning: The divergence jumps over the requested one, and the nearest one is more than 2 % away.
        NotMonotoneWarning: The divergence falls somewhere as the strength grows.
    """
    if isinstance(nats, bool) or not isinstance(nats, (int, float)) or not (math.isfinite(nats) and nats > 0):
        raise TrimtabError(f"a divergence is a number of nats above 0, such as 1, got {nats!r}")
    base = reference(lm, prompts, tokens=tokens, system=system, chat=chat, template=template)
    divergence_by_factor: dict[float, Divergence] = {}

    def divergence_at(factor: float) -> float:
        if factor not in divergence_by_factor:
            divergence_by_factor[factor] = divergence(lm, factor * steering, base, transfer=transfer)
        return divergence_by_factor[factor].p95

    with lm._caching_prefixes():
        factor = find_factor(divergence_at, nats)
    check_reached(nats, factor, divergence_at(factor))
    tried = tuple(sorted((at_factor, value.p95) for at_factor, value in divergence_by_factor.items()))
    result = AtNats(factor * steering, factor, divergence_by_factor[factor], tried)
    if abs(result.divergence.p95 - nats) > CLOSE * nats:
        warnings.warn(
            f"the divergence jumps over {nats:g} nats: the nearest is {result.divergence.p95:.3g}, at {factor:.3g}"
            " times the steering",
            InexactWarning,
            stacklevel=caller_stacklevel(),
        )
    if not result.monotone:
        warnings.warn(
            "the divergence doesn't grow with the strength everywhere: "
            + ", ".join(f"{value:.2g} nats at {at_factor:.3g}" for at_factor, value in tried)
            + f"; using the weakest strength that was found to reach {nats:g}",
            NotMonotoneWarning,
            stacklevel=caller_stacklevel(),
        )
    return result


def find_factor(divergence_at: Callable[[float], float], nats: float, tolerance: float = CLOSE) -> float:
    """The factor at which `divergence_at(factor)`, a divergence, is `nats` within a share `tolerance`, or the closest
    that was found.

    Args:
        divergence_at: The divergence at a factor, in nats; called with the same factor more than once.
        nats: The divergence to reach.
        tolerance: The tolerance, as a share of `nats`.

    Raises:
        TrimtabError: No factor up to `MAX_FACTOR` reaches that divergence.
    """
    high = _first_reaching_factor(divergence_at, nats)
    low, factor = high / 2, high
    distances = {}
    for _ in range(HALVINGS):
        distances[factor] = divergence_at(factor)
        if abs(distances[factor] - nats) <= tolerance * nats:
            break
        if distances[factor] < nats:
            low = factor
        else:
            high = factor
        factor = _between((low, divergence_at(low)), (high, divergence_at(high)), nats)
    return min(distances, key=lambda candidate: abs(distances[candidate] - nats))


def check_reached(nats: float, factor: float, reached: float) -> None:
    """Raise `TrimtabError` if the nearest divergence that was found isn't near the requested one.

    Args:
        nats: The divergence that was requested.
        factor: The factor from `find_factor`.
        reached: The divergence there.
    """
    if abs(reached - nats) > FAR * nats:
        raise TrimtabError(
            f"the divergence jumps over {nats:g} nats: the nearest is {reached:.2g}, at {factor:.3g} times the"
            " steering; ask for a divergence near that, or give a strength"
        )


def _between(low: tuple[float, float], high: tuple[float, float], nats: float) -> float:
    """The factor to try next: by interpolation in logarithms, but well inside the interval."""
    share = 0.5
    if 0 < low[1] < nats < high[1] < math.inf:
        share = min(0.85, max(0.15, math.log(nats / low[1]) / math.log(high[1] / low[1])))
    return float(low[0] * (high[0] / low[0]) ** share)


def monotone(tried: Sequence[tuple[float, float]]) -> bool:
    """Whether no (factor, divergence), in order of factors, is clearly below the divergence of a weaker one."""
    highest = 0.0
    for _, value in tried:
        if value < FALLS * highest:
            return False
        highest = max(highest, value)
    return True


def _first_reaching_factor(divergence_at: Callable[[float], float], nats: float) -> float:
    """The smallest power of 2 that reaches `nats`, searching up from below `BELOW` consecutive ones that don't."""
    factor, below = 1.0, 0
    if divergence_at(1.0) == 0 and divergence_at(MAX_FACTOR) == 0:
        raise TrimtabError(
            f"even at {MAX_FACTOR:g} times its strength the steering changes nothing on these prompts: its vectors are"
            " 0 (for example, because nothing useful was learned), or it acts where it has no effect on the answers"
        )
    while factor > MIN_FACTOR and below < BELOW:
        below = below + 1 if divergence_at(factor) < nats else 0
        factor /= 2
    while divergence_at(factor) < nats:
        if factor >= MAX_FACTOR:
            raise TrimtabError(
                f"at {factor:g} times its strength the steering's divergence is only {divergence_at(factor):.2g} nats"
                f" on these prompts (95th percentile), so {nats:g} nats can't be reached; ask for less, or give a"
                " strength"
            )
        factor *= 2
    return factor
