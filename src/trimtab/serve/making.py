"""Making a steering from an idea while the server runs: it has the model to itself, and reports its progress."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from trimtab.making import Idea, Made, idea_from_contrast, idea_from_sentence, make, make_from_pairs
from trimtab.making.evaluation import Example
from trimtab.making.make import STAGES, TOKENS
from trimtab.serve.adding import add_steering, check_may_add
from trimtab.serve.library import LoadedSteering
from trimtab.serve.policy import Key
from trimtab.serve.refusals import Refusal
from trimtab.serve.scheduler import Draining
from trimtab.serve.schema_steerings import MakeRequest
from trimtab.serve.service import Service
from trimtab.text.pairs import Pair, pairs_from_rows

SHOWN = 4
RETRY_SECONDS = 60
"""The `Retry-After`, in seconds, while another steering is being made."""


@dataclass(frozen=True)
class Step:
    """The progress: `stage` is number `number` of `STAGES`, from 1; 0 while it waits for the model.

    `done` of `total` is the progress within the stage, and `said` what is known so far, in words.
    """

    stage: str = "waiting for the model"
    number: int = 0
    done: int = 0
    total: int = 1
    said: str = ""


@dataclass(frozen=True)
class Finished:
    """The result, the steering as it was added to the server (if it was), and the answers that may be shown."""

    made: Made
    loaded: LoadedSteering | None
    examples: tuple[Example, ...]


def learning_target(request: MakeRequest) -> Idea | list[Pair]:
    """What to learn: an idea with the number of questions requested, or pairs.

    Raises:
        Refusal: Neither a sentence nor a persona nor pairs, or two of them.
        TrimtabError: A text without a word, `like` and `unlike` the same, or pairs that can't be read.
    """
    if sum(part is not None for part in (request.idea, request.like, request.pairs)) != 1:
        raise Refusal(
            400,
            'describe what you want: idea, such as "be blunt, not flattering", or like, such as "a pirate", or pairs',
            param="idea",
        )
    if request.unlike is not None and request.like is None:
        raise Refusal(400, 'unlike needs like; in an idea, put the opposite after "not"', param="unlike")
    if request.pairs is not None:
        if "questions" in request.model_fields_set:
            raise Refusal(400, "pairs contain their own questions; leave questions out", param="questions")
        return pairs_from_rows(request.model_dump()["pairs"])
    wanted = (
        idea_from_sentence(request.idea)
        if request.idea is not None
        else idea_from_contrast(request.like or "", request.unlike)
    )
    half = request.questions // 2
    return replace(wanted, learn=wanted.learn[:half], test=wanted.test[: request.questions - half])


async def make_steering(
    service: Service, key: Key, audit_fields: dict[str, str], request: MakeRequest
) -> AsyncGenerator[Step | Finished, None]:
    """Make the steering; yields the progress, then the result, added if the verdict holds or `keep` is set.

    Closing the generator cancels it: it ends at its next stage or answer. Only one steering is made at a time.

    Args:
        service: The server.
        key: The caller.
        audit_fields: The request's id, its key's name and the route, for the audit log.
        request: What to make.

    Raises:
        Refusal: The key may not add steerings, the name is taken, another one is being made, or the server is shutting
            down.
        TrimtabError: The model's answers for and against the idea barely differ.
    """
    check_may_add(service, key, request.name)
    wanted, tokens = learning_target(request), _tokens(service, request)
    if not service.making_lock.acquire(blocking=False):
        raise Refusal(429, "another steering is being made; try again when it is done", retry=RETRY_SECONDS)
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Step | None] = asyncio.Queue()
    disconnected = threading.Event()
    last = Step()

    def report(step: Step) -> None:
        """Report progress, in the model's thread. An exception raised here stops the making."""
        nonlocal last
        last = step
        if disconnected.is_set():
            raise _ClientDisconnected
        if service.scheduler.grace_expired:
            raise Draining
        with suppress(RuntimeError):  # the loop is closed: the server is shutting down
            loop.call_soon_threadsafe(queue.put_nowait, step)

    def job() -> Made:
        how: dict[str, Any] = {
            "tokens": tokens,
            "distill": request.distill,
            "stage": lambda what, done, total: report(Step(what, STAGES.index(what) + 1, done, total, last.said)),
            "say": lambda words: report(replace(last, said=words)),
        }
        if isinstance(wanted, Idea):
            return make(service.lm, wanted, **how)
        return make_from_pairs(service.lm, wanted, name=request.name, **how)

    try:
        future = service.scheduler.run(job)
    except Draining as draining:
        service.making_lock.release()
        raise Refusal(503, str(draining), retry=5) from None
    future.add_done_callback(lambda _: service.making_lock.release())
    result_future = asyncio.wrap_future(future)
    result_future.add_done_callback(lambda _: queue.put_nowait(None))
    outcome, made = "cancelled", None
    try:
        yield Step()
        while (step := await queue.get()) is not None:
            yield step
        outcome = "failed"
        made = await result_future
        outcome = "added" if made.verdict.holds or request.keep else "none"
        loaded = (
            add_steering(service, audit_fields, request.name, made.steering, "made") if outcome == "added" else None
        )
        yield Finished(made, loaded, made.examples[:SHOWN] if _may_show(service, key) else ())
    except Draining as draining:
        outcome = "shutdown"
        raise Refusal(503, str(draining), retry=5) from None
    finally:
        disconnected.set()
        result_future.cancel()  # if it hasn't begun, it never will
        _write_down(service, audit_fields, request, made, outcome)


class _ClientDisconnected(Exception):
    """The client has disconnected."""


def _tokens(service: Service, request: MakeRequest) -> int:
    most = service.limits.max_tokens
    if request.tokens is None:
        return min(TOKENS, most)
    if request.tokens > most:
        raise Refusal(400, f"tokens can be at most {most} on this server", param="tokens")
    return request.tokens


def _may_show(service: Service, key: Key) -> bool:
    """Whether the policy lets through answers without the server's steerings, and with this one at strength 1."""
    low, high = service.policy.range_of(key)
    return not service.policy.always and service.policy.dose_cap(key) is None and low <= 1 <= high


def _write_down(
    service: Service, audit_fields: dict[str, str], request: MakeRequest, made: Made | None, outcome: str
) -> None:
    verdict = {}
    if made is not None:
        what = "gain" if made.verdict.share is None else "share_of_prompt"
        verdict = {"holds": made.verdict.holds, what: made.verdict.effect}
    idea = {key: value for key in ("idea", "like", "unlike") if (value := getattr(request, key)) is not None}
    if request.pairs is not None:
        idea["pairs"] = len(request.pairs)
    service.audit.write(
        {"event": "made", **audit_fields, "made": request.name, **verdict, "outcome": outcome}, prompt=idea
    )
