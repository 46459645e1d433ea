"""The plausibility test of a decode step, its gate, and the sequence of weaker steerings (DIRECTER, 2603.06745,
section 3).

    z = unsteered logits;  tau = max z + ln beta
    gate closed  the second best of z is below tau: no other token could be accepted, so nothing is steered
    gate open    take the best token c of the first candidate with z[c] >= tau; if there is none, the unsteered best

Tokens are always judged by the unsteered logits, for any kind of steering.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.keywords import class_keywords
from trimtab.steering import Edit, Steering

LADDERS = ("halve", "strength")
SCHEDULES = ("auto", "optimistic", "fused")
RANKINGS = ("paper", "repo")
STRENGTH_CANDIDATES = 5


@class_keywords
@dataclass(frozen=True)
class Rejection:
    """Settings for weakening or rejecting a steering if its token is implausible.

    Args:
        beta: The minimum probability of an accepted token, as a share of the probability of the unsteered model's best
            token: 0 accepts everything, 1 only ties.
        min_layers: The minimum number of layers of a candidate (2: as in the released code; 1: as in the paper's text).
        ladder: How candidates get weaker. `"halve"` keeps the first half of the layers for each weaker candidate, in
            the order of `ranking`, down to `min_layers`. `"strength"` keeps all layers and halves the strength, for
            five candidates.
        schedule: How candidates are computed: `"optimistic"`, `"fused"`, or `"auto"`, which is `"optimistic"` on CPUs
            and otherwise `"fused"`. The tokens are the same except for near-ties.
        ranking: `"paper"`, `"repo"` (as computed by the released code), or a tuple of layers, best first.
    """

    beta: float = 0.5
    min_layers: int = 2
    ladder: str = "halve"
    schedule: str = "auto"
    ranking: str | tuple[int, ...] = "paper"

    def __post_init__(self) -> None:
        if isinstance(self.beta, bool) or not isinstance(self.beta, (int, float)) or not 0 <= self.beta <= 1:
            raise TrimtabError(f"beta lies between 0 and 1, got {self.beta!r}")
        if isinstance(self.min_layers, bool) or not isinstance(self.min_layers, int) or self.min_layers < 1:
            raise TrimtabError(f"min_layers is a whole number from 1 up, got {self.min_layers!r}")
        for name, value, known in (("ladder", self.ladder, LADDERS), ("schedule", self.schedule, SCHEDULES)):
            if value not in known:
                raise TrimtabError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        if isinstance(self.ranking, str):
            if self.ranking not in RANKINGS:
                raise TrimtabError(
                    f"unknown ranking {self.ranking!r}; known: {', '.join(RANKINGS)}, or layers in order"
                )
        else:
            object.__setattr__(self, "ranking", tuple(self.ranking))
            if len(set(self.ranking)) != len(self.ranking):
                raise TrimtabError(f"the ranking {self.ranking} names a layer twice")

    @property
    def ranks(self) -> bool:
        """Whether the order of the layers has to be computed."""
        return self.ladder == "halve" and isinstance(self.ranking, str)


def halving_subsets(order: Sequence[int], min_layers: int = 2) -> tuple[tuple[int, ...], ...]:
    """All layers, then the first half of the order, a quarter, … while at least `min_layers` are left.

    These are `floor(log2 L)` candidates with `min_layers=2`, and one more with 1.
    """
    candidates = []
    size = len(order)
    while size >= min_layers:
        candidates.append(tuple(order[:size]))
        size //= 2
    return tuple(candidates)


def ladder(edits: Sequence[Edit], rejection: Rejection, order: Sequence[int] = ()) -> tuple[tuple[Edit, ...], ...]:
    """The edits of each candidate, strongest first, without duplicates.

    `order` ranks the edits' layers, best first, if `rejection.ladder` is `"halve"`. Raises `TrimtabError` if there are
    edits but no candidate, or if the order lacks one of their layers.
    """
    if not edits:
        return ()
    steering = Steering(tuple(edits))
    if rejection.ladder == "strength":
        candidates = [(0.5**t * steering).edits for t in range(STRENGTH_CANDIDATES)]
    else:
        if missing := sorted(set(steering.layers) - set(order)):
            raise TrimtabError(f"the ranking leaves out layer {missing[0]}, at which the steering acts")
        layer_subsets = halving_subsets([layer for layer in order if layer in steering.layers], rejection.min_layers)
        candidates = [tuple(edit for edit in edits if edit.site.layer in subset) for subset in layer_subsets]
    if not candidates:
        raise TrimtabError(
            f"the steering acts at {len(steering.layers)} layer, and min_layers is {rejection.min_layers}, so that"
            ' no candidate is left; use ladder="strength", or min_layers=1'
        )
    return tuple(dict.fromkeys(candidates))


def threshold(raw: Tensor, beta: Tensor) -> Tensor:
    """`max z + ln beta`, for unsteered logits `[rows, vocabulary]` and `beta` `[rows]`; -inf if beta is 0."""
    return raw.max(-1).values + beta.to(raw.dtype).log()


def gate_open(raw: Tensor, tau: Tensor) -> Tensor:
    """`[rows]`: whether any token except the best could be accepted. If not, steering can't change the token."""
    return raw.topk(2, dim=-1).values[:, 1] >= tau


def plausible(raw: Tensor, tau: Tensor, candidate: Tensor, rows: Tensor | None = None) -> Tensor:
    """`[candidates]`: whether these tokens are accepted, given the unsteered logits `raw` `[rows, vocabulary]`.

    `rows` are the rows of `raw` for each token; without them, each row has one token. `tau` has one value per token.
    """
    return (raw.gather(-1, candidate[:, None])[:, 0] if rows is None else raw[rows, candidate]) >= tau
