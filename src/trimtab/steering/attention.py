"""Operations on attention scores, in the columns of a span of the prompt.

An `Edit` at `Site(layer, "scores")` selects the columns by its `positions`, which must be in the prompt. Every query
that attends to them is steered. Strength 0 does nothing, and strength 1 is the operation as documented here.

If several operations act at one layer, scalings are applied first, since they are equivalent to scaled keys; then the
model's own soft cap and mask; then biases and target masses, in the steering's order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.errors import TrimtabError
from trimtab.keywords import class_keywords

POOLS = ("head", "layer")


@dataclass(frozen=True)
class ScoreOperation:
    """The base class of all operations on attention scores. They have plain numbers and no direction."""


@class_keywords
@dataclass(frozen=True)
class ScaleScores(ScoreOperation):
    """`score' = alpha^strength * score` in the span's columns, in every head.

    Equivalent to multiplying the span's cached keys by `alpha` (DIRECTER, 2603.06745), without changing the cache.
    It doesn't always raise attention: a negative score becomes more negative.
    """

    alpha: float = 100.0

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha)
        if self.alpha <= 0:
            raise TrimtabError(f"alpha is a factor above 0, got {self.alpha}")

    def factor(self, strength: float) -> float:
        """The factor for scores at this strength. Raises `TrimtabError` if it is outside the range of float32."""
        try:
            value = self.alpha**strength
        except OverflowError:
            value = math.inf
        if not 0 < value < 1e30:
            raise TrimtabError(f"alpha {self.alpha:g} at strength {strength:g} scales scores by {value:g}; lower it")
        return value


@class_keywords
@dataclass(frozen=True)
class BiasScores(ScoreOperation):
    """`score' = score + strength * bias` in the span's columns, in these `heads` (`None`: all).

    With `outside`, the columns are the prompt's columns outside the span (outside all of its parts). Columns of
    generated tokens don't change.
    """

    bias: float
    heads: tuple[int, ...] | None = None
    outside: bool = False

    def __post_init__(self) -> None:
        check_number("bias", self.bias)
        if self.heads is not None:
            heads = tuple(self.heads)
            if not heads or any(isinstance(h, bool) or not isinstance(h, int) or h < 0 for h in heads):
                raise TrimtabError(f"heads are whole numbers from 0, at least one, got {self.heads!r}")
            object.__setattr__(self, "heads", tuple(sorted(set(heads))))


@class_keywords
@dataclass(frozen=True)
class TargetMass(ScoreOperation):
    """A bias that raises a query's attention to the span if its attention mass there is below `strength * target`.

    The bias is `ln(target / mass)`, after which the mass is `target / (1 + target - mass)`, a little below the target
    (SpotLight, 2505.12025). With `exact`, the bias gives exactly the target. `pool="head"` uses each head's own mass,
    `"layer"` the mean over the layer's heads.
    """

    target: float = 0.2
    pool: str = "head"
    exact: bool = False

    def __post_init__(self) -> None:
        check_number("target", self.target)
        if not 0 < self.target < 1:
            raise TrimtabError(f"a target mass lies between 0 and 1, got {self.target}")
        if self.pool not in POOLS:
            raise TrimtabError(f"unknown pool {self.pool!r}; known: {', '.join(POOLS)}")

    def mass(self, strength: float) -> float:
        """The target at this strength. Raises `TrimtabError` unless it is between 0 and 1."""
        value = self.target * strength
        if not 0 < value < 1:
            raise TrimtabError(f"target {self.target:g} at strength {strength:g} is {value:g}, not between 0 and 1")
        return value


SCORE_OPERATIONS: dict[str, type[ScoreOperation]] = {
    "scale_scores": ScaleScores,
    "bias_scores": BiasScores,
    "target_mass": TargetMass,
}
SCORE_NAMES = {operation: name for name, operation in SCORE_OPERATIONS.items()}


def check_number(name: str, value: float) -> None:
    """Raise `TrimtabError` unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TrimtabError(f"{name} is a finite number, got {value!r}")
