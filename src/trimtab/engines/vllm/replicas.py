"""Work for several engines, any of which may be lost: in portions, with retries, and answers in the portions' order.

Nothing here knows what starts an engine or what it runs. `on_ray` says how on a Ray cluster.
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
"""So often a portion is tried again whose engine was lost; so many engines in a row may be lost while they start."""
AHEAD = 4
"""So many portions for each engine are done ahead of the one that is wanted: what comes early is held in memory."""
PORTION = 256
"""Requests in a portion at most: as many as vLLM runs at a time by default."""

Answer = Hashable
"""What stands for an answer that is still to come."""


class LostEngine(Exception):
    """An engine is gone, and its call with it; the reason, in words."""


class LostEngineWarning(UserWarning):
    """One of several engines was lost, and another takes its place."""


class Cluster(Protocol):
    """Where engines run."""

    def start(self) -> Any:
        """A new engine, which may take minutes. Raises `TrimtabError` where it never could."""

    def ask(self, engine: Any, method: str, arguments: Sequence[Any]) -> Answer:
        """Have an engine run a call; it runs one at a time."""

    def wait(self, answers: Sequence[Answer]) -> Answer:
        """The first of these that has come. Raises `TrimtabError` where none ever can."""

    def take(self, answer: Answer) -> Any:
        """An answer that has come. Raises `LostEngine`, and the `TrimtabError` that the engine refused with."""

    def stop(self, engine: Any) -> None:
        """End an engine, at once, whatever it is doing; nothing where it is gone already."""


@dataclass(eq=False)
class Deal:
    """Portions of one piece of work: which wait for an engine, and what came of those that are done."""

    method: str
    portions: Sequence[Sequence[Any]]
    came: Callable[[int], None] | None = None
    following: int = 0  # the portion whose answer is wanted next
    over: bool = False  # nobody wants answers any more
    refused: TrimtabError | None = None

    def __post_init__(self) -> None:
        self.waiting: deque[int] = deque(range(len(self.portions)))
        self.answers: dict[int, Any] = {}
        self.losses: Counter[int] = Counter()

    def answer(self, number: int, value: Any) -> None:
        self.answers[number] = value
        if self.came is not None and not self.over:
            self.came(number)

    def lose(self, number: int, reason: str) -> None:
        """A portion's engine is lost: it is tried again, unless that happened too often."""
        self.losses[number] += 1
        if self.losses[number] > RETRIES:
            self.refused = TrimtabError(
                f"part {number + 1} of {len(self.portions)} was lost with its engine {self.losses[number]} times; the"
                f" last time {reason}"
            )
        self.waiting.appendleft(number)


@dataclass
class Replicas:
    """So many engines of one model, which start at the first call and run until `close`.

    Args:
        cluster: Where they run.
        count: How many there are; one that is lost is replaced.
        check: Called with what each engine answers to `"hello"` once it has started; it raises for one that differs
            from the others.
    """

    cluster: Cluster
    count: int
    check: Callable[[Any], None] = lambda _hello: None
    lost: int = 0  # engines, so far
    _idle: list[Any] = field(default_factory=list)
    _starting: dict[Answer, Any] = field(default_factory=dict)
    _busy: dict[Answer, tuple[Any, Deal, int]] = field(default_factory=dict)
    _failed: int = 0  # engines lost while they started, since one did start
    _reason: str = ""

    def open(self) -> None:
        """Start the engines, and wait for the first. Raises `TrimtabError` where they can't be had."""
        try:
            while not self._idle and not self._busy:
                self._fill()
                self._hear()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all engines. The next call starts new ones."""
        engines = [*self._idle, *self._starting.values(), *(engine for engine, _, _ in self._busy.values())]
        self._idle, self._starting, self._busy, self._failed = [], {}, {}, 0
        for engine in engines:
            self.cluster.stop(engine)

    def deal(
        self, method: str, portions: Sequence[Sequence[Any]], came: Callable[[int], None] | None = None
    ) -> Iterator[Any]:
        """Have the engines do all portions, and yield what comes of each in the portions' order.

        Which engine does what depends on who is free. A portion whose engine is lost goes to the next one that is free.

        Args:
            method: What engines run.
            portions: The arguments of each call.
            came: Called with the number of each portion as its answer comes, in whatever order.

        Raises:
            TrimtabError: What an engine refused with; a portion that was lost with its engine `RETRIES` + 1 times; no
                engine is left.
        """
        deal = Deal(method, portions, came)
        try:
            with self._stopping():
                while deal.following < len(portions):
                    if deal.refused is not None:
                        raise deal.refused
                    if deal.following in deal.answers:
                        value = deal.answers.pop(deal.following)
                        deal.following += 1
                        yield value
                        continue
                    self._fill()
                    self._hand_out(deal)
                    self._hear()
        finally:
            deal.over = True

    def _fill(self) -> None:
        """Start as many engines as are lacking. Raises `TrimtabError` where there are none and none will start."""
        while len(self._idle) + len(self._busy) + len(self._starting) < self.count:
            if self._failed > RETRIES:
                if self._idle or self._busy or self._starting:
                    return  # those that run go on
                failed = self._failed
                self.close()
                raise TrimtabError(f"{failed} engines in a row were lost as they started; the last time {self._reason}")
            engine = self.cluster.start()
            self._starting[self.cluster.ask(engine, "hello", ())] = engine

    # An interrupt may come between any two lines below, so an engine is on its new list before it leaves the old one.

    def _hand_out(self, deal: Deal) -> None:
        while self._idle and deal.waiting and deal.waiting[0] < deal.following + AHEAD * self.count:
            engine, number = self._idle[0], deal.waiting.popleft()
            self._busy[self.cluster.ask(engine, deal.method, deal.portions[number])] = engine, deal, number
            del self._idle[0]

    def _hear(self) -> None:
        """Wait for an answer, and take it to whom it is for. Its engine is idle then; or it is gone."""
        answer = self.cluster.wait([*self._busy, *self._starting])
        if answer in self._starting:
            self._hear_hello(answer)
            return
        engine, deal, number = self._busy[answer]
        try:
            value = self.cluster.take(answer)
        except LostEngine as error:
            self._gone(engine, error)
            del self._busy[answer]
            deal.lose(number, str(error))
            return
        except TrimtabError as error:
            deal.refused = error
        self._idle.append(engine)
        del self._busy[answer]
        if deal.refused is None:
            deal.answer(number, value)

    def _hear_hello(self, answer: Answer) -> None:
        engine = self._starting[answer]
        try:
            self.check(self.cluster.take(answer))
        except LostEngine as error:
            self._failed += 1
            self._gone(engine, error)
        except TrimtabError:
            self.cluster.stop(engine)
            del self._starting[answer]
            raise
        else:
            self._failed = 0
            self._idle.append(engine)
        del self._starting[answer]

    def _gone(self, engine: Any, error: LostEngine) -> None:
        self.lost += 1
        self._reason = str(error)
        self.cluster.stop(engine)
        warnings.warn(f"an engine was lost ({error}); its call is repeated", LostEngineWarning, stacklevel=2)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Ends all engines where somebody interrupts, as Ctrl-C does: else they would go on for nobody."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self.close()
            raise


def parted(count: int, replicas: int) -> list[range]:
    """The places of so many requests in portions: at least one for each engine, where there are so many requests.

    Places that follow each other go to different portions, so that a list that is sorted by length is spread evenly.
    """
    portions = min(count, replicas * -(-count // (replicas * PORTION)))
    return [range(first, count, portions) for first in range(portions)]
