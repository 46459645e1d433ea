"""Distribute work over several engines, any of which may fail: in portions, with retries and ordered results.

Nothing here depends on how engines are started or what they run. `on_ray` implements it for a Ray cluster.
"""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from trimtab.errors import TrimtabError

RETRIES = 3
"""How often a portion is retried after losing its engine, and how many engines in a row may be lost while starting."""
AHEAD = 4
"""How many portions per engine are computed ahead of the next one to be returned; early results are kept in memory."""
PORTION = 256
"""The maximum number of requests per portion: as many as vLLM runs at a time by default."""

Answer = Hashable
"""A handle for a result that is still being computed."""


class LostEngine(Exception):
    """An engine is gone, and its call with it. The message says why."""


class LostEngineWarning(UserWarning):
    """One of several engines was lost, and is being replaced."""


class Cluster(Protocol):
    """Where engines run."""

    def start(self) -> Any:
        """Start a new engine, which may take minutes. Raises `TrimtabError` if none can ever start."""

    def ask(self, engine: Any, method: str, arguments: Sequence[Any]) -> Answer:
        """Start a call on an engine; an engine runs one at a time."""

    def wait(self, answers: Sequence[Answer]) -> Answer:
        """Wait for the first of these results. Raises `TrimtabError` if none can ever arrive."""

    def take(self, answer: Answer) -> Any:
        """The value of a result that has arrived. Raises `LostEngine`, or the `TrimtabError` that the engine raised."""

    def stop(self, engine: Any) -> None:
        """Stop an engine immediately, whatever it is doing; no effect if it is already gone."""


@dataclass(eq=False)
class Job:
    """The portions of one piece of work: those that wait for an engine, and the results of those that are done."""

    method: str
    portions: Sequence[Sequence[Any]]
    on_result: Callable[[int], None] | None = None
    next_portion: int = 0  # the next portion to be returned
    abandoned: bool = False  # no more results are needed
    error: TrimtabError | None = None

    def __post_init__(self) -> None:
        self.waiting: deque[int] = deque(range(len(self.portions)))
        self.answers: dict[int, Any] = {}
        self.losses: Counter[int] = Counter()

    def add_result(self, number: int, value: Any) -> None:
        self.answers[number] = value
        if self.on_result is not None and not self.abandoned:
            self.on_result(number)

    def record_loss(self, number: int, reason: str) -> None:
        """A portion's engine was lost: retry the portion, unless that has happened too often."""
        self.losses[number] += 1
        if self.losses[number] > RETRIES:
            self.error = TrimtabError(
                f"part {number + 1} of {len(self.portions)} was lost with its engine {self.losses[number]} times; the"
                f" last time {reason}"
            )
        self.waiting.appendleft(number)


@dataclass
class Replicas:
    """Several engines of one model, which start with the first call and run until `close`.

    Args:
        cluster: Where they run.
        count: The number of engines; a lost engine is replaced.
        check: Called with each engine's response to `"hello"` after it has started; raises if the engine differs from
            the others.
    """

    cluster: Cluster
    count: int
    check: Callable[[Any], None] = lambda _hello: None
    lost: int = 0  # engines, so far
    _idle: list[Any] = field(default_factory=list)
    _starting: dict[Answer, Any] = field(default_factory=dict)
    _busy: dict[Answer, tuple[Any, Job, int]] = field(default_factory=dict)
    _failed: int = 0  # engines lost while starting, since the last successful start
    _reason: str = ""

    def open(self) -> None:
        """Start the engines, and wait for the first. Raises `TrimtabError` if none starts."""
        try:
            while not self._idle and not self._busy:
                self._fill()
                self._receive_result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop all engines. The next call starts new ones."""
        engines = [*self._idle, *self._starting.values(), *(engine for engine, _, _ in self._busy.values())]
        self._idle, self._starting, self._busy, self._failed = [], {}, {}, 0
        for engine in engines:
            self.cluster.stop(engine)

    def run_portions(
        self, method: str, portions: Sequence[Sequence[Any]], on_result: Callable[[int], None] | None = None
    ) -> Iterator[Any]:
        """Run all portions on the engines, and yield each result in the portions' order.

        Any free engine takes the next portion. If its engine is lost, the portion goes to the next free one.

        Args:
            method: The method that engines run.
            portions: The arguments of each call.
            on_result: Called with the index of each portion when its result arrives, in any order.

        Raises:
            TrimtabError: An engine refused a call; a portion lost its engine `RETRIES` + 1 times; or no engine is left.
        """
        job = Job(method, portions, on_result)
        try:
            with self._stopping():
                while job.next_portion < len(portions):
                    if job.error is not None:
                        raise job.error
                    if job.next_portion in job.answers:
                        value = job.answers.pop(job.next_portion)
                        job.next_portion += 1
                        yield value
                        continue
                    self._fill()
                    self._dispatch(job)
                    self._receive_result()
        finally:
            job.abandoned = True

    def _fill(self) -> None:
        """Start the missing engines. Raises `TrimtabError` if there are none and none will start."""
        while len(self._idle) + len(self._busy) + len(self._starting) < self.count:
            if self._failed > RETRIES:
                if self._idle or self._busy or self._starting:
                    return  # the running ones continue
                failed = self._failed
                self.close()
                raise TrimtabError(f"{failed} engines in a row were lost as they started; the last time {self._reason}")
            engine = self.cluster.start()
            self._starting[self.cluster.ask(engine, "hello", ())] = engine

    # An interrupt may occur between any two lines below, so an engine is on its new list before it leaves the old one.

    def _dispatch(self, job: Job) -> None:
        while self._idle and job.waiting and job.waiting[0] < job.next_portion + AHEAD * self.count:
            engine, number = self._idle[0], job.waiting.popleft()
            self._busy[self.cluster.ask(engine, job.method, job.portions[number])] = engine, job, number
            del self._idle[0]

    def _receive_result(self) -> None:
        """Wait for a result and store it in its deal. The engine is then idle, or gone."""
        answer = self.cluster.wait([*self._busy, *self._starting])
        if answer in self._starting:
            self._finish_start(answer)
            return
        engine, job, number = self._busy[answer]
        try:
            value = self.cluster.take(answer)
        except LostEngine as error:
            self._discard_engine(engine, error)
            del self._busy[answer]
            job.record_loss(number, str(error))
            return
        except TrimtabError as error:
            job.error = error
        self._idle.append(engine)
        del self._busy[answer]
        if job.error is None:
            job.add_result(number, value)

    def _finish_start(self, answer: Answer) -> None:
        engine = self._starting[answer]
        try:
            self.check(self.cluster.take(answer))
        except LostEngine as error:
            self._failed += 1
            self._discard_engine(engine, error)
        except TrimtabError:
            self.cluster.stop(engine)
            del self._starting[answer]
            raise
        else:
            self._failed = 0
            self._idle.append(engine)
        del self._starting[answer]

    def _discard_engine(self, engine: Any, error: LostEngine) -> None:
        self.lost += 1
        self._reason = str(error)
        self.cluster.stop(engine)
        warnings.warn(f"an engine was lost ({error}); its call is repeated", LostEngineWarning, stacklevel=2)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Stop all engines on an interrupt such as Ctrl-C; otherwise they would keep running."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self.close()
            raise


def split_indices(count: int, replicas: int) -> list[range]:
    """Split the indices of `count` requests into portions: at least one per engine, if there are enough requests.

    Neighboring indices go to different portions, so that a list sorted by length is spread evenly.
    """
    portions = min(count, replicas * -(-count // (replicas * PORTION)))
    return [range(first, count, portions) for first in range(portions)]
