"""A row of the batch that is decoded step by step: what it is to be, how far it has come, and its report."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimtab.decoding.rejection import Rejection
from trimtab.decoding.trace import Step, Trace
from trimtab.engines.answer import Applied
from trimtab.engines.images import PromptImages
from trimtab.engines.meanings import NOTHING, Followed, Follower, Holding
from trimtab.engines.transformers.grammar import Matcher
from trimtab.engines.transformers.monitoring import Log
from trimtab.engines.transformers.sampling import GREEDY, RowSampler, Sampling, Settings
from trimtab.engines.transformers.session import Tally, doses_of
from trimtab.engines.transformers.verify import Ladder
from trimtab.steering import Edit, Steering
from trimtab.steering.monitors import Monitor


@dataclass(frozen=True)
class GenerationRequest:
    """What one row is to be: a rendered prompt, its steering, how its tokens are chosen, and how many at most.

    `alternatives`: how many of the likeliest tokens are reported at each place; `None` reports no log-probabilities.
    `settings` are those of `sampling` and the model's own, unless they are given. With `rejection` the steering acts on
    the token that is being decoded, where that is plausible. `matcher` stands at the beginning of the grammar that the
    answer keeps to; the row takes a copy. `clean_cache`: what is stored of the text is what the unsteered model would
    store; only `CleanBatch` has such rows. `monitors` read its tokens. `scope`: for whom what the row has read may be
    kept, and from whose it may go on, where a batch keeps it. `images` are those whose places the ids hold.
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
        """The prompt, and what steers it while it is read: nothing with rejection."""
        return self.ids, None if self.rejection is not None else self.steering


@dataclass(frozen=True)
class GenerationResponse:
    """One token of one row. `finish` is `"stop"` or `"length"` with its last, and `applied` then what steered it.

    `logprob` and `likeliest` (ids and log-probabilities, best first) are under the model that gave the token, steered
    or not, before any temperature. `trace` comes with the last token where there is rejection. With `error` there is no
    token: the row couldn't go on and has left.

    `monitored` is what the row's monitors read where the token was chosen, and `fired` are those beyond their threshold
    for the first time. One of them may end the answer: `finish` is then `"content_filter"`, and there is no token.
    `cached` tokens of the prompt were taken over from another row.
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
    """One row. `edits` are what its passes are steered by; what waits to be verified is in its `ladder`."""

    key: int
    request: GenerationRequest
    began: float
    edits: tuple[Edit, ...] = ()
    names: tuple[str, ...] = ()
    sampler: RowSampler | None = None
    ladder: Ladder | None = None
    tokens: list[int] = field(default_factory=list)
    pushed: Tally = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    passes: int = 0
    first: float = 0.0  # seconds to the first token
    log: Log = field(default_factory=Log)
    cached: int = 0  # tokens of its prompt that were taken over
    shift: int = 0  # how many positions more than tokens there are before what it reads next (below 0: fewer)
    switched: bool = False  # whether a monitor has changed its edits, which the session doesn't know yet
    text: Follower | None = None  # where the ladder's edits ask what is generated
    at: Followed | None = None  # where that is

    @property
    def length(self) -> int:
        """Tokens so far, the prompt's included."""
        return len(self.request.ids) + len(self.tokens)

    @property
    def newest(self) -> int:
        """The last token so far."""
        return self.tokens[-1] if self.tokens else self.request.ids[-1]

    @property
    def holding(self) -> Holding:
        """The meanings of the newest token, where the ladder's edits ask for them."""
        return NOTHING if self.at is None else self.at.holding

    def read(self, token: int) -> None:
        """It goes on with this token."""
        self.tokens.append(token)
        if self.text is not None:
            self.at = self.text.after(self.at or self.text.start, token)

    def add(self, more: Tally) -> None:
        """Add what was measured of it."""
        for site, (total, measured, tokens) in more.items():
            before = self.pushed.get(site, (0.0, 0.0, 0))
            self.pushed[site] = (before[0] + total, before[1] + measured, before[2] + tokens)

    def forget(self) -> None:
        """Begin anew."""
        self.tokens, self.pushed, self.steps, self.passes, self.at = [], {}, [], 0, None
        self.log = Log()

    def applied(self, more: Tally | None = None) -> Applied:
        """What has steered it so far; with what was measured since."""
        both = BatchRow(self.key, self.request, self.began, pushed=dict(self.pushed))
        both.add(more or {})
        return Applied(self.names, doses_of(both.pushed))

    @property
    def trace(self) -> Trace | None:
        """What rejection did so far; `None` where there is none."""
        ladder = self.ladder
        if ladder is None:
            return None
        return Trace(tuple(self.steps), ladder.descriptions(), ladder.order, ladder.schedule, self.passes, self.first)
