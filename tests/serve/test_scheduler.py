"""The queue and the batch behind it: rows that leave at once, limits, rejection beside the batch, and shutting down."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from trimtab import Rejection, ScaleScores
from trimtab.serve.scheduler import Draining, QueueFull, Scheduler
from trimtab.serve.tasks import Done, Event, Failed, Piece, Task
from trimtab.steering import emphasis

PROMPT = "The sea is wide and blue. Write in capitals!"


class Heard:
    """What one task was told, and when it was over."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.over = threading.Event()
        self.begun = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.begun.set()
        if not isinstance(event, Piece):
            self.over.set()

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token.id for event in self.events if isinstance(event, Piece) for token in event.tokens)

    @property
    def end(self) -> Event:
        assert self.over.wait(60)
        return self.events[-1]


@pytest.fixture
def scheduler(make_service: Callable[..., Any]) -> Scheduler:
    working: Scheduler = make_service().scheduler
    working.start()
    return working


def task(scheduler: Scheduler, prompt: str = PROMPT, **options: Any) -> tuple[Task, Heard]:
    heard = Heard()
    ids = tuple(scheduler.lm.encode(prompt))
    return Task(ids, heard, **{"max_new_tokens": 12, **options}), heard


def steering(scheduler: Scheduler, number: int) -> Any:
    import torch

    from trimtab import Add, Edit, Site, Steering

    v = torch.randn(32, generator=torch.Generator().manual_seed(number))
    return Steering((Edit(Site(1), Add(v)),))


def slowed(scheduler: Scheduler, seconds: float = 0.02) -> None:
    """Each step takes at least so long, so that something can happen between them."""
    step = scheduler._batch.step

    def slow() -> Any:
        time.sleep(seconds)
        return step()

    scheduler._batch.step = slow  # type: ignore[method-assign]


def test_everybody_gets_what_they_get_alone(scheduler: Scheduler) -> None:
    made = [task(scheduler, f"{PROMPT} {'blue ' * i}", steering=steering(scheduler, i)) for i in range(12)]
    for job, _ in made:
        scheduler.submit([job])
    for i, (job, heard) in enumerate(made):
        end = heard.end
        assert isinstance(end, Done)
        (answer,) = scheduler.lm.generate(f"{PROMPT} {'blue ' * i}", job.steering, max_new_tokens=12)
        assert (heard.ids, heard.text, end.tokens) == (answer.token_ids, answer.text, len(answer.token_ids))
        assert end.applied.edits == answer.applied.edits


def test_a_stop_text_ends_an_answer(scheduler: Scheduler) -> None:
    (answer,) = scheduler.lm.generate(PROMPT, max_new_tokens=12)
    stop = answer.text[3:6]
    job, heard = task(scheduler, stop=(stop,))
    scheduler.submit([job])
    end = heard.end
    assert isinstance(end, Done)
    assert (end.finish, heard.text) == ("stop", answer.text[: answer.text.index(stop)])
    assert end.tokens < len(answer.token_ids)
    assert scheduler.running == 0


def test_a_task_that_is_cancelled_leaves_before_the_next_step(scheduler: Scheduler) -> None:
    slowed(scheduler)
    job, heard = task(scheduler, max_new_tokens=60)
    other, beside = task(scheduler, max_new_tokens=60, steering=steering(scheduler, 1))
    scheduler.submit([job, other])
    assert heard.begun.wait(60)
    at = scheduler.steps
    scheduler.cancel([job])
    end = heard.end
    assert isinstance(end, Failed)
    assert end.kind == "cancelled"
    assert scheduler.steps - at <= 1
    assert isinstance(beside.end, Done)
    assert len(heard.ids) < len(beside.ids)


def test_a_full_queue_accepts_nothing(make_service: Callable[..., Any]) -> None:
    scheduler = make_service(rows=2, waiting=3).scheduler
    made = [task(scheduler) for _ in range(5)]
    scheduler.submit([job for job, _ in made])
    with pytest.raises(QueueFull) as full:
        scheduler.submit([task(scheduler)[0]])
    assert 1 <= full.value.seconds <= 60
    assert scheduler.queued == 5
    scheduler.start()
    assert all(isinstance(heard.end, Done) for _, heard in made)
    late, heard = task(scheduler)
    scheduler.submit([late])
    assert isinstance(heard.end, Done)


def test_a_task_has_its_time(scheduler: Scheduler) -> None:
    slowed(scheduler, 0.05)
    job, heard = task(scheduler, max_new_tokens=60, seconds=0.3)
    scheduler.submit([job])
    end = heard.end
    assert isinstance(end, Failed)
    assert end.kind == "timeout"
    assert scheduler.running == 0


@pytest.mark.parametrize("how", ["cancelled", "timeout", "shutdown"])
def test_a_long_prompt_can_be_left_while_it_is_read(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Cancelling, the time limit and shutting down act between two of its chunks, and nobody else notices."""
    from trimtab.engines.transformers import chunked_prefill, decode

    for module in (chunked_prefill, decode):
        monkeypatch.setattr(module, "CHUNK", 2)
    long, unheard = task(scheduler, "blue " * 70)
    other, beside = task(scheduler, "blue", max_new_tokens=40)
    step, passes = scheduler._batch.step, []

    def until_the_fifth() -> Any:
        passes.append(1)
        if len(passes) == 5:
            if how == "cancelled":
                scheduler.cancel([long])
            elif how == "timeout":
                long.deadline = 0.0
            else:
                scheduler.drain(-1.0)
        return step()

    scheduler._batch.step = until_the_fifth  # type: ignore[method-assign]
    scheduler.submit([long, other])
    end, last = unheard.end, beside.end
    assert isinstance(end, Failed)
    assert (end.kind, unheard.ids) == (how, ())
    assert isinstance(last, Failed if how == "shutdown" else Done)
    assert len(passes) == 5 if how == "shutdown" else len(passes) >= 40  # the prompt alone has more chunks than five
    assert scheduler.running == 0


def test_a_dose_above_the_cap_ends_an_answer(scheduler: Scheduler) -> None:
    mild, heard = task(scheduler, steering=0.001 * steering(scheduler, 1), max_dose=0.5)
    wild, unheard = task(scheduler, steering=1000.0 * steering(scheduler, 1), max_dose=0.5)
    scheduler.submit([mild, wild])
    assert isinstance(heard.end, Done)
    end = unheard.end
    assert isinstance(end, Failed)
    assert end.kind == "dose"
    assert unheard.ids == ()


class TestRejection:
    def emphasized(self, scheduler: Scheduler, **options: Any) -> tuple[Task, Heard]:
        spans = [(2, 5)]
        towards = emphasis(ScaleScores(), spans, range(scheduler.lm.layout.layers), "directer")
        return task(scheduler, steering=towards, rejection=Rejection(), **options)

    def test_answers_are_those_of_lm_generate(self, scheduler: Scheduler) -> None:
        job, heard = self.emphasized(scheduler)
        more, beside = self.emphasized(scheduler, prompt=PROMPT + " blue", max_new_tokens=5)
        scheduler.submit([job, more])
        for (each_job, listener), prompt, count in (((job, heard), PROMPT, 12), ((more, beside), PROMPT + " blue", 5)):
            end = listener.end
            assert isinstance(end, Done)
            (answer,) = scheduler.lm.generate(
                prompt,
                each_job.steering,
                rejection=each_job.rejection,
                max_new_tokens=count,  # type: ignore[arg-type]
            )
            assert listener.ids == answer.token_ids
            assert answer.trace is not None
            assert end.trace is not None
            assert end.trace.steps == answer.trace.steps

    def test_the_batch_goes_on_beside_it(self, scheduler: Scheduler) -> None:
        order: list[str] = []
        job, heard = self.emphasized(scheduler, max_new_tokens=20)
        plain, beside = task(scheduler, max_new_tokens=20, steering=steering(scheduler, 3))
        for name, this in (("apart", job), ("batch", plain)):
            inner = this.deliver
            this.deliver = lambda event, inner=inner, name=name: (order.append(name), inner(event))  # type: ignore
        scheduler.submit([job, plain])
        assert isinstance(heard.end, Done)
        assert isinstance(beside.end, Done)
        switches = sum(a != b for a, b in pairwise(order))
        assert switches > 5
        (answer,) = scheduler.lm.generate(PROMPT, plain.steering, max_new_tokens=20)
        assert beside.ids == answer.token_ids

    def test_it_can_be_cancelled(self, scheduler: Scheduler) -> None:
        slowed(scheduler)
        job, heard = self.emphasized(scheduler, max_new_tokens=60)
        _, beside = pair = task(scheduler, max_new_tokens=60)
        scheduler.submit([job, pair[0]])
        assert heard.begun.wait(60)
        scheduler.cancel([job])
        end = heard.end
        assert isinstance(end, Failed)
        assert end.kind == "cancelled"
        assert isinstance(beside.end, Done)


class TestTheEnd:
    def test_what_was_accepted_is_finished(self, scheduler: Scheduler) -> None:
        slowed(scheduler)
        made = [task(scheduler) for _ in range(20)]
        scheduler.submit([job for job, _ in made])
        scheduler.drain(60)
        with pytest.raises(Draining):
            scheduler.submit([task(scheduler)[0]])
        assert all(isinstance(heard.end, Done) for _, heard in made)
        scheduler.close()
        assert not scheduler.alive

    def test_what_takes_too_long_is_told_so(self, scheduler: Scheduler) -> None:
        slowed(scheduler, 0.05)
        made = [task(scheduler, max_new_tokens=60) for _ in range(12)]
        scheduler.submit([job for job, _ in made])
        scheduler.drain(0.3)
        ends = [heard.end for _, heard in made]
        assert all(isinstance(end, (Done, Failed)) for end in ends)
        assert {end.kind for end in ends if isinstance(end, Failed)} == {"shutdown"}
        scheduler.close()
        assert not scheduler.alive

    def test_a_model_that_breaks_fails_its_answers_and_no_others(self, scheduler: Scheduler) -> None:
        step, broken = scheduler._batch.step, threading.Event()

        def breaks() -> Any:
            if not broken.is_set():
                broken.set()
                raise RuntimeError("out of memory")
            return step()

        scheduler._batch.step = breaks  # type: ignore[method-assign]
        job, heard = task(scheduler)
        scheduler.submit([job])
        end = heard.end
        assert isinstance(end, Failed)
        assert (end.kind, "memory" in end.message) == ("server", False)
        other, beside = task(scheduler)
        scheduler.submit([other])
        assert isinstance(beside.end, Done)

    def test_other_work_is_done_between_steps(self, scheduler: Scheduler) -> None:
        slowed(scheduler)
        job, heard = task(scheduler, max_new_tokens=30)
        scheduler.submit([job])
        assert scheduler.run(lambda: scheduler.lm.capture(PROMPT, [1])).result(60)[0]
        with pytest.raises(ZeroDivisionError):
            scheduler.run(lambda: 1 / 0).result(60)
        assert isinstance(heard.end, Done)
