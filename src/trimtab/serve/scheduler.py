"""The one thread that runs the model: a bounded queue, and continuous batching."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from trimtab.engines.answer import Applied
from trimtab.engines.transformers.batch_row import GenerationRequest, GenerationResponse
from trimtab.engines.transformers.few_rows import few_rows
from trimtab.engines.transformers.monitoring import MonitorLog
from trimtab.engines.transformers.prefixes import PrefixBatch, RequestPrefixCache
from trimtab.errors import TrimtabError
from trimtab.lm import LM
from trimtab.serve.tasks import NOTHING, Done, Event, Failed, GeneratedToken, Piece, Task, total_dose
from trimtab.steering.monitors import FILTERED
from trimtab.text.detokenizer import Detokenizer

DOSE_EVERY = 8
"""How often, in tokens, a row's dose is compared with its cap; also at its first two tokens."""


class QueueFull(Exception):
    """The queue is full; there may be room in `seconds`."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the server is busy; try again in {seconds} s")
        self.seconds = seconds


class Draining(Exception):
    """The server is shutting down and accepts nothing more."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


@dataclass(eq=False)
class _Answer:
    """A task that is being answered."""

    task: Task
    text: Detokenizer
    tokens: int = 0
    pending_tokens: list[GeneratedToken] = field(default_factory=list)
    log: MonitorLog = field(default_factory=MonitorLog)
    cached: int = 0

    def take(self, token: GeneratedToken, last: bool) -> None:
        """Add a token, and deliver the text that is complete. At the `last` token, held-back text is delivered too."""
        self.tokens += 1
        self.pending_tokens.append(token)
        piece = self.text.add(token.id)
        if last or self.text.stopped:
            piece += self.text.finish()
        if piece or last or self.text.stopped:
            self.task.deliver(Piece(piece, tuple(self.pending_tokens)))
            self.pending_tokens = []

    def flush(self) -> None:
        """Deliver held-back text when no more tokens follow."""
        self.task.deliver(Piece(self.text.finish(), tuple(self.pending_tokens)))
        self.pending_tokens = []


class Scheduler:
    """`submit` from any thread; answers come through each task's `deliver`.

    At most `rows` tasks are decoded at a time, and at most `max_queued` more are queued. `finished(event, task)` is
    called at the end of each task, for metrics. `prefixes` is the prefix cache for tasks that have a scope.
    """

    def __init__(
        self,
        lm: LM,
        *,
        rows: int = 32,
        max_queued: int = 64,
        finished: Callable[[Event, Task], None] = lambda _event, _task: None,
        prefixes: RequestPrefixCache | None = None,
    ) -> None:
        self.lm = lm
        self.rows = rows
        self.max_queued = max_queued
        self.steps = 0
        self._finished = finished
        self._batch = PrefixBatch(lm.model, lm.tokenizer, lm.layout, prefixes=prefixes)
        self._changed = threading.Condition()
        self._queue: deque[Task] = deque()
        self._cancelled: set[Task] = set()
        self._jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self._answers: dict[int, _Answer] = {}
        self._drain_until: float | None = None
        self._closed = False
        self._pace = 1.0  # moving average of the seconds per task
        self._thread = threading.Thread(target=self._loop, name="trimtab-scheduler", daemon=True)

    # ---- from any thread ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def queued(self) -> int:
        """The number of tasks that were accepted and haven't begun."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """The number of tasks that are being answered."""
        return len(self._answers)

    @property
    def draining(self) -> bool:
        """Whether it accepts nothing more."""
        return self._drain_until is not None or self._closed

    @property
    def grace_expired(self) -> bool:
        """Whether the grace period for accepted tasks is over."""
        return self._drain_until is not None and time.monotonic() > self._drain_until

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    def check(self, task: Task) -> None:
        """Raises `TrimtabError` for a task that can't run; the caller has to call `lm.check(steering)` itself."""
        self._batch.check(_request(task))
        edits = task.steering.edits if task.rejection is not None and task.steering is not None else ()
        if task.max_dose is not None and any(edit.site.kind != "scores" for edit in edits):
            raise TrimtabError("doses aren't measured with rejection, but this server caps them; leave rejection out")
        if edits and task.monitors:
            raise TrimtabError("monitors can't be combined with rejection; ask for rejection: false")

    def check_capacity(self, count: int) -> None:
        """Raises `QueueFull` or `Draining` if `count` tasks wouldn't be accepted now."""
        if self.draining:
            raise Draining
        free = max(0, self.rows - self.running)
        if len(self._queue) + count > self.max_queued + free:
            ahead = (len(self._queue) + count) / max(1, self.rows)
            raise QueueFull(max(1, min(60, round(self._pace * ahead))))

    def submit(self, tasks: list[Task]) -> None:
        """Accept all of these tasks, or raise `QueueFull` or `Draining` and accept none."""
        with self._changed:
            self.check_capacity(len(tasks))
            now = time.monotonic()
            for task in tasks:
                task.deadline = now + task.seconds
                self._queue.append(task)
            self._changed.notify()

    def cancel(self, tasks: list[Task]) -> None:
        """Cancel these tasks: they leave the batch before the next step, each with a `Failed("cancelled")` event."""
        with self._changed:
            self._cancelled.update(tasks)
            self._changed.notify()

    def run(self, job: Callable[[], Any]) -> Future[Any]:
        """Run a function in the model's thread, between two steps. Raises `Draining`."""
        future: Future[Any] = Future()
        with self._changed:
            if self.draining:
                raise Draining
            self._jobs.append((job, future))
            self._changed.notify()
        return future

    def drain(self, seconds: float) -> None:
        """Accept nothing more; accepted tasks have `seconds` to end before they fail. Returns at once."""
        with self._changed:
            until = time.monotonic() + seconds
            self._drain_until = until if self._drain_until is None else min(until, self._drain_until)
            self._changed.notify()

    def close(self, seconds: float = 0.0) -> None:
        """Drain, then stop the thread."""
        self.drain(seconds)
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds + 30)

    # ---- in the thread -----------------------------------------------------------------------------------

    @torch.inference_mode()  # a token takes some 5 % less time than with no_grad
    def _loop(self) -> None:
        with few_rows(self.lm.model):
            self._run_until_closed()

    def _run_until_closed(self) -> None:
        while True:
            with self._changed:
                while not (self._queue or self._cancelled or self._jobs or self._answers):
                    if self._closed:
                        return
                    self._changed.wait()
            try:
                self._run_once()
            except Exception as error:  # from the model, in a step of the whole batch: out of memory, say
                self._fail_all(f"{type(error).__name__} while the model ran")

    def _run_once(self) -> None:
        self._sweep_and_admit()
        if self._answers:
            with self.lm._exclusive():
                self._step()
        if self._jobs:
            job, future = self._jobs.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    with torch.inference_mode(False):  # its results are used outside inference mode
                        future.set_result(job())
                except Exception as error:
                    future.set_exception(error)

    def _sweep_and_admit(self) -> None:
        """Remove tasks that are cancelled or past their deadline, and start queued ones while there is room."""
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            now = time.monotonic()
            shut = self.grace_expired
            for key, answer in list(self._answers.items()):
                if (why := self._failure_of(answer.task, cancelled, now, shut)) is not None:
                    applied = self._batch.remove(key)
                    del self._answers[key]
                    self._end(answer, why, applied)
            left: deque[Task] = deque()
            for task in self._queue:
                if (why := self._failure_of(task, cancelled, now, shut)) is not None:
                    self._end(self._begin(task), why)
                elif len(self._answers) < self.rows:
                    self._join(task)
                else:
                    left.append(task)
            self._queue = left

    def _failure_of(self, task: Task, cancelled: set[Task], now: float, shut: bool) -> Failed | None:
        if task in cancelled:
            return Failed("cancelled", "the client has disconnected")
        if now > task.deadline:
            return Failed("timeout", f"the answer took longer than {task.seconds:g} s")
        return Failed("shutdown", "the server is shutting down") if shut else None

    def _begin(self, task: Task) -> _Answer:
        return _Answer(task, Detokenizer(self.lm.tokenizer, task.stop, task.shown))

    def _join(self, task: Task) -> None:
        answer = self._begin(task)
        try:
            self._answers[self._batch.insert(_request(task))] = answer
        except TrimtabError as error:  # all other errors were ruled out by `check`
            self._end(answer, Failed("input", str(error)))

    def _step(self) -> None:
        self.steps += 1
        for response in self._batch.step():
            answer = self._answers.get(response.key)
            if answer is not None:
                self._process_response(answer, response)

    def _process_response(self, answer: _Answer, response: GenerationResponse) -> None:
        task = answer.task
        if response.error is not None:
            del self._answers[response.key]
            expected = isinstance(response.error, TrimtabError)
            message = str(response.error) if expected else f"{type(response.error).__name__} during prefill"
            self._end(answer, Failed("input" if expected else "server", message))
            return
        applied = response.applied
        answer.cached = response.cached
        if task.max_dose is not None and (response.finish or answer.tokens < 2 or answer.tokens % DOSE_EVERY == 0):
            now = applied or self._batch.applied(response.key) or NOTHING
            dose = total_dose(now)
            if not dose <= task.max_dose:
                self._batch.remove(response.key)
                del self._answers[response.key]
                message = (
                    f"the doses of all sites add up to {dose:.2g}, and the cap is {task.max_dose:g}; lower the"
                    " strengths, or steer at fewer layers"
                )
                self._end(answer, Failed("dose", message), now)
                return
        if task.monitors:
            answer.log.add(task.monitors, response.monitored)
        if response.finish == FILTERED:
            answer.flush()
        else:
            token = GeneratedToken(response.token, response.logprob, response.likeliest, response.monitored)
            answer.take(token, bool(response.finish))
        finish = "stop" if answer.text.stopped else response.finish
        if finish:
            del self._answers[response.key]
            trace = response.trace or self._batch.trace(response.key)
            applied = applied or self._batch.remove(response.key, ended=True) or NOTHING
            if math.isfinite(total_dose(applied)):
                read = answer.log.readings(task.monitors) if task.monitors else None
                self._end(answer, Done(finish, answer.tokens, applied, trace, monitors=read, cached=answer.cached))
            else:
                self._end(answer, Failed("dose", "the push is too large to be measured; lower the strength"), applied)

    def _end(self, answer: _Answer, event: Event, applied: Applied | None = None) -> None:
        if isinstance(event, Failed):
            read = answer.log.readings(answer.task.monitors) if answer.task.monitors else None
            event = replace(event, tokens=answer.tokens, applied=applied or NOTHING, monitors=read)
        else:
            took = time.monotonic() - (answer.task.deadline - answer.task.seconds)
            self._pace += 0.1 * (took - self._pace)
        answer.task.deliver(event)
        self._finished(event, answer.task)

    def _fail_all(self, message: str) -> None:
        self._batch.clear()
        answers, self._answers = list(self._answers.values()), {}
        for answer in answers:
            self._end(answer, Failed("server", message))


def _request(task: Task) -> GenerationRequest:
    return GenerationRequest(
        task.ids,
        task.steering,
        task.max_new_tokens,
        task.sampling,
        task.alternatives,
        rejection=task.rejection if task.steering is not None and task.steering.edits else None,
        matcher=task.matcher,
        clean_cache=task.clean_cache and task.rejection is None,  # rejection always has a clean cache
        monitors=task.monitors,
        scope=task.scope,
        images=task.images,
    )
