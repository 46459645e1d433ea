"""One answer that is requested, and the events while it comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from trimtab.decoding.rejection import Rejection
from trimtab.decoding.trace import Trace
from trimtab.engines.images import PromptImages
from trimtab.engines.transformers.generate import Applied
from trimtab.engines.transformers.grammar import Matcher
from trimtab.engines.transformers.sampling import GREEDY, Sampling
from trimtab.steering import Steering
from trimtab.steering.monitors import Monitor, Monitored

NOTHING = Applied((), ())


def total_dose(applied: Applied) -> float:
    """The doses of all sites added up: the longest that their pushes can come to, in lengths of the activation.

    The residual stream carries each on, so that many small ones in one direction are a large one.
    """
    return math.fsum(dose.ratio for dose in applied.doses)


@dataclass(frozen=True)
class TokenTold:
    """A token's id; where requested, its log-probability, the likeliest ones', best first, and what monitors read."""

    id: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()
    monitored: tuple[float, ...] = ()


@dataclass(frozen=True)
class Piece:
    """More text, and the tokens that came since the piece before."""

    text: str
    tokens: tuple[TokenTold, ...]


@dataclass(frozen=True)
class Done:
    """The end: why (`"stop"`, `"length"`, `"content_filter"`), how many tokens, what steered them, what was read."""

    finish: str
    tokens: int
    applied: Applied
    trace: Trace | None = None
    monitors: Mapping[str, Monitored] | None = None
    cached: int = 0


@dataclass(frozen=True)
class Failed:
    """The end, without an answer. `kind`: `"timeout"`, `"dose"`, `"input"`, `"shutdown"`, `"cancelled"`, `"server"`.

    `tokens` and `applied` are how far it had come until then, and what had steered it.
    """

    kind: str
    message: str
    tokens: int = 0
    applied: Applied = NOTHING
    trace: Trace | None = None
    monitors: Mapping[str, Monitored] | None = None


Event = Piece | Done | Failed


@dataclass(eq=False)
class Task:
    """What one answer is to be. `deliver` is called in the scheduler's thread and must not wait.

    `ids` is the rendered prompt. Its answer keeps to the grammar at whose beginning `matcher` is; `shown` are special
    tokens that its text has. `steering` holds edits of attention scores as well. `seconds` counts from when it is
    submitted. `clean_cache`: it is steered over the unsteered model's cache. `monitors` read its tokens. `scope`: for
    whom what it has read may be kept; `None`: for nobody. `images` are those whose places the ids hold.
    """

    ids: tuple[int, ...]
    deliver: Callable[[Event], None]
    steering: Steering | None = None
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    alternatives: int | None = None
    stop: tuple[str, ...] = ()
    rejection: Rejection | None = None
    max_dose: float | None = None
    seconds: float = 600.0
    clean_cache: bool = False
    monitors: tuple[Monitor, ...] = ()
    scope: str | None = None
    matcher: Matcher | None = None
    shown: frozenset[int] = frozenset()
    images: PromptImages | None = None
    deadline: float = field(default=float("inf"), init=False)
