"""A row of a batch in continuous batching: its request, its state, and its responses."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimtab.decoding.rejection import Rejection
from trimtab.decoding.trace import Step, Trace
from trimtab.engines.answer import Applied
from trimtab.engines.images import PromptImages
from trimtab.engines.meanings import NOTHING, ActiveMeanings, Follower, FollowerState
from trimtab.engines.transformers.grammar import Matcher
from trimtab.engines.transformers.monitoring import MonitorLog
from trimtab.engines.transformers.sampling import GREEDY, RowSampler, Sampling, Settings
from trimtab.engines.transformers.session import Tally, doses_of
from trimtab.engines.transformers.verify import Ladder
from trimtab.steering import Edit, Steering
from trimtab.steering.monitors import Monitor


@dataclass(frozen=True)
class GenerationRequest:
    """A request for one row: a rendered prompt, its steering, the sampling settings, and the maximum number of tokens.

    `alternatives` is the number of likeliest tokens that are reported for each token; with `None`, no log-probabilities
    are reported. `settings` default to those of `sampling` and the model. With `rejection`, the steering acts on the
    token being decoded, as far as that token is plausible. `matcher` is the answer's grammar in its start state; the
    row takes a copy. With `clean_cache`, the cache holds the keys and values of the unsteered model; only `CleanBatch`
    supports this. `monitors` read the row's tokens. In a batch with a prefix cache, `scope` limits reuse to rows of the
    same scope, except for unsteered prefixes in a shared cache; with `None`, nothing of the row is cached. `images`
    belong to the image placeholders in `ids`.
    """

    ids: tuple[int, ...]
    steering: Steering | None = None
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    alternatives: int | None = None
    settings: Settings | None = None
    rejection: Rejection | None = None
    matcher: Matcher | None = None
    clean_cache: bool = False
    monitors: tuple[Monitor, ...] = ()
    scope: str | None = None
    images: PromptImages | None = None

    @property
    def prefill(self) -> tuple[tuple[int, ...], Steering | None]:
        """The prompt, and the steering that acts during prefill: none with rejection."""
        return self.ids, None if self.rejection is not None else self.steering


@dataclass(frozen=True)
class GenerationResponse:
    """One token of one row. With the last one, `finish` is `"stop"` or `"length"`, and `applied` says what steered it.

    `logprob` and `likeliest` (ids and log-probabilities, best first) are those of the model that produced the token,
    steered or not, before temperature. With rejection, the last token comes with a `trace`. With `error` there is no
    token: the row failed and has left the batch.

    `monitored` are the monitors' readings at the position that the token was predicted from, and `fired` are the
    monitors that crossed their threshold for the first time. A monitor may end the answer: `finish` is then
    `"content_filter"`, and there is no token. `cached` is the number of prompt tokens reused from another row.
    """

    key: int
    token: int = -1
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    applied: Applied | None = None
    trace: Trace | None = None
    error: Exception | None = None
    cached: int = 0
    monitored: tuple[float, ...] = ()
    fired: tuple[str, ...] = ()


@dataclass(eq=False)
class BatchRow:
    """The state of one row. `edits` act in its forward passes; edits subject to rejection are in its `ladder`."""

    key: int
    request: GenerationRequest
    began: float
    edits: tuple[Edit, ...] = ()
    names: tuple[str, ...] = ()
    sampler: RowSampler | None = None
    ladder: Ladder | None = None
    tokens: list[int] = field(default_factory=list)
    dose_tally: Tally = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    passes: int = 0
    first: float = 0.0  # seconds to the first token
    log: MonitorLog = field(default_factory=MonitorLog)
    cached: int = 0  # prompt tokens reused from another row
    shift: int = 0  # the next position minus the number of tokens before it; images may make it nonzero
    edits_changed: bool = False  # whether a monitor has changed its edits, and the session hasn't been updated yet
    follower: Follower | None = None  # tracks the generated text, if the ladder's edits have positions by meaning
    follower_state: FollowerState | None = None  # the current state of `text`

    @property
    def length(self) -> int:
        """The number of tokens so far, including the prompt's."""
        return len(self.request.ids) + len(self.tokens)

    @property
    def newest(self) -> int:
        """The last token so far."""
        return self.tokens[-1] if self.tokens else self.request.ids[-1]

    @property
    def holding(self) -> ActiveMeanings:
        """The meanings of the newest token, if the ladder's edits have positions by meaning."""
        return NOTHING if self.follower_state is None else self.follower_state.holding

    def append_token(self, token: int) -> None:
        """Append a token."""
        self.tokens.append(token)
        if self.follower is not None:
            self.follower_state = self.follower.after(self.follower_state or self.follower.start, token)

    def add(self, more: Tally) -> None:
        """Add measurements for the doses."""
        for site, (total, measured, tokens) in more.items():
            before = self.dose_tally.get(site, (0.0, 0.0, 0))
            self.dose_tally[site] = (before[0] + total, before[1] + measured, before[2] + tokens)

    def reset(self) -> None:
        """Reset to the state before the first token."""
        self.tokens, self.dose_tally, self.steps, self.passes, self.follower_state = [], {}, [], 0, None
        self.log = MonitorLog()

    def applied(self, more: Tally | None = None) -> Applied:
        """The edits that acted so far and their doses, including measurements in `more`."""
        both = BatchRow(self.key, self.request, self.began, dose_tally=dict(self.dose_tally))
        both.add(more or {})
        return Applied(self.names, doses_of(both.dose_tally))

    @property
    def trace(self) -> Trace | None:
        """What rejection did so far; `None` without rejection."""
        ladder = self.ladder
        if ladder is None:
            return None
        return Trace(tuple(self.steps), ladder.descriptions(), ladder.order, ladder.schedule, self.passes, self.first)
