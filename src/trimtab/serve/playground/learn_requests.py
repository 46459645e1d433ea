"""Learning a steering from pairs that a user typed or dropped in, with progress."""

from __future__ import annotations

import asyncio
import base64
import html
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.files.steering_file import steering_to_bytes
from trimtab.report.pushes import pushes
from trimtab.serve.adding import add_steering, check_may_add, learn_steering
from trimtab.serve.library import LoadedSteering
from trimtab.serve.playground.callers import new_request_identity
from trimtab.serve.playground.sweep import whole_numbers
from trimtab.serve.policy import Key
from trimtab.serve.refusals import Refusal
from trimtab.serve.schema_steerings import LearnRequest
from trimtab.serve.service import Service
from trimtab.steering import Steering
from trimtab.text.pairs import pairs_from_text, row_of

METHODS = ("as the pairs ask for", "caa", "instruct")
OFF = "Learning is off on this server. Start it with: trimtab serve --learn"


@dataclass(frozen=True)
class LearnResult:
    """A learned steering as it was added to the server, and the warnings while it was learned."""

    loaded: LoadedSteering
    remarks: tuple[str, ...] = ()


def build_learn_request(name: str, method: str, text: str, layers: str) -> LearnRequest:
    """The API request. Raises `TrimtabError` for pairs that can't be read, and pydantic's `ValidationError`."""
    if not name.strip():
        raise TrimtabError("give the steering a name, such as polite")
    pairs = pairs_from_text(text)
    if method == METHODS[0]:
        method = "instruct" if pairs[0].shape == "prompts" else "caa"
    body: dict[str, Any] = {"name": name.strip(), "method": method, "pairs": [row_of(pair) for pair in pairs]}
    if chosen := whole_numbers(layers):
        body["layers"] = list(chosen)
    return LearnRequest.model_validate(body)


async def learn(service: Service, key: Key, request: LearnRequest) -> AsyncIterator[tuple[int, int] | LearnResult]:
    """Learn, and yield how many pairs of how many were read; at last the lesson, which the server has then.

    Raises `Refusal` if learning is off, or not for this key, and `TrimtabError` if nothing can be learned.
    """
    if not service.learn:
        raise Refusal(403, OFF)
    check_may_add(service, key, request.name)
    loop = asyncio.get_running_loop()
    steps: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()

    def progress(done: int, total: int) -> None:
        loop.call_soon_threadsafe(steps.put_nowait, (done, total))

    job = asyncio.ensure_future(learn_steering(service, request, progress))
    job.add_done_callback(lambda _: steps.put_nowait(None))
    yield 0, len(request.pairs)
    while (step := await steps.get()) is not None:
        yield step
    made = await job
    yield LearnResult(
        add_steering(service, new_request_identity(key), request.name, made.steering, "learned"), made.remarks
    )


def as_row(prompt: str, positive: str, negative: str) -> str:
    """One typed pair as a line of JSONL. Raises `TrimtabError` if a side is missing."""
    if not positive.strip() or not negative.strip():
        raise TrimtabError("a pair needs both: what the model should say, and what it shouldn't")
    opening = {"prompt": prompt.strip()} if prompt.strip() else {}
    return json.dumps({**opening, "positive": positive.strip(), "negative": negative.strip()}, ensure_ascii=False)


def learn_result_html(lesson: LearnResult) -> str:
    """What was learned, as HTML, with a link to save the file."""
    loaded = lesson.loaded
    name = html.escape(loaded.name)
    remarks = "".join(f'<p class="tt-note">{html.escape(remark)}</p>' for remark in lesson.remarks)
    return (
        f'<div class="tt-lesson" role="status"><p><strong>{name}</strong> was learned and is selected on the panel.</p>'
        f"<p>{html.escape(_measured(loaded.steering))}</p>{remarks}{download_link(loaded)}</div>"
    )


def download_link(loaded: LoadedSteering) -> str:
    """A link to save the steering's file, as HTML."""
    data = base64.b64encode(steering_to_bytes(loaded.steering)).decode()
    name = html.escape(loaded.name, quote=True)
    return (
        f'<p><a class="tt-save" download="{name}.safetensors" href="data:application/octet-stream;base64,{data}">'
        f"Save {name}.safetensors</a></p>"
        '<p class="tt-note">The server keeps it until it stops. To use it again, save the file and put it into the'
        " folder given with --steerings.</p>"
    )


def _measured(steering: Steering) -> str:
    """Where it acts, the norm of its push, and how much the pairs agree, if the card has these."""
    parts = []
    for push in pushes(steering)[:4]:
        words = f"layer {push.layer}: push of {push.norm:.3g}"
        if push.share is not None:
            words += f", {push.share:.0%} of the activation's length"
        if push.agreement is not None:
            words += f"; agreement of the pairs {push.agreement:.2f}"
        parts.append(words)
    return " · ".join(parts)
