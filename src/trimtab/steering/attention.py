"""What an edit does to attention scores: operations on the columns of a span of the prompt.

An `Edit` at `Site(layer, "scores")` names the columns by its `positions`, which lie in the prompt; every query that
can see them is steered. Strength 0 does nothing and strength 1 is the operation as it is written down here.

Of several operations at one layer, the scalings come first, since they stand for other keys; then soft caps and the
mask, as in the model; then biases and masses, in the steering's order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.errors import TrimtabError
from trimtab.keywords import class_keywords

POOLS = ("head", "layer")


@dataclass(frozen=True)
class ScoreOperation:
    """What all operations on attention scores share: they are plain numbers, with no direction in them."""


@class_keywords
@dataclass(frozen=True)
class ScaleScores(ScoreOperation):
    """`score' = alpha^strength * score` in the span's columns, in every head.

    It is the same as multiplying the span's cached keys by `alpha` (DIRECTER, 2603.06745), without touching them.
    It isn't more attention: a negative score becomes more negative.
    """

    alpha: float = 100.0

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha)
        if self.alpha <= 0:
            raise TrimtabError(f"alpha is a factor above 0, got {self.alpha}")

    def factor(self, strength: float) -> float:
        """What a score is multiplied by. Raises `TrimtabError` when that leaves what a float32 holds."""
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
    """`score' = score + strength * bias` in the span's columns, in `heads` (`None`: in all).

    With `outside`, the columns are those of the prompt outside the span (outside of all of its parts); generated
    columns are left alone.
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
    """Where a query attends to the span with less than `strength * target` of its weight, a bias that raises it.

    The bias is `ln(target / mass)`, after which the mass is `target / (1 + target - mass)`, a little below the target
    (SpotLight, 2505.12025); with `exact` it is the one that gives precisely the target. `pool="head"` takes each
    head's own mass, `"layer"` the mean of a layer's heads.
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
        """The target at this strength. Raises `TrimtabError` unless it lies between 0 and 1."""
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
    """Raises `TrimtabError` unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TrimtabError(f"{name} is a finite number, got {value!r}")
