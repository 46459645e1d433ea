"""What an answer's tokens are coloured by: what rejection did with each, or its cosine with a steering's vector."""

from __future__ import annotations

import asyncio
import html
from collections.abc import Sequence
from functools import partial

from trimtab.errors import TrimtabError
from trimtab.evaluate.ab import spread
from trimtab.report.sweep import directions
from trimtab.report.tokens import answer_cosines, cosine_key, cosine_spans, reach
from trimtab.report.traces import trace_spans
from trimtab.serve.playground.asking import Side
from trimtab.serve.policy import Key
from trimtab.serve.refusals import Refusal
from trimtab.serve.service import Service

NOTHING, REJECTION = "nothing", "rejection"
LONGEST = 2048
MOST_LAYERS = 3
"""Of a steering at many layers, so many are offered."""

TRACE_KEY = (
    '<span class="steered">steered</span> <span class="weakened">by a weaker rung</span>'
    ' <span class="rejected">steering rejected</span> <span class="changed">another token than the raw model\'s</span>'
    " <span>plain: gate shut</span>"
)
NO_TRACE = "No answer here was given with rejection. It is on where something is emphasized; the panel has it."


def offered(service: Service, key: Key) -> list[tuple[str, str]]:
    """What tokens may be coloured by, as (words, value): a vector's value is `name@layer`."""
    found = [("nothing", NOTHING), ("what rejection did", REJECTION)]
    for one in service.visible(key):
        try:
            layers = sorted(directions(one.steering))
        except TrimtabError:
            continue
        sites = {edit.site.layer for edit in one.steering.edits if edit.site.kind == "residual"}
        shown = spread([layer for layer in layers if layer in sites], MOST_LAYERS)
        found += [(f"{one.name}, layer {layer}", f"{one.name}@{layer}") for layer in shown]
    return found


async def read(service: Service, key: Key, sides: Sequence[Side], colour: str) -> None:
    """Read the cosines that aren't known yet, between two steps of the batch.

    Raises `Refusal` for a vector that isn't there, or isn't this key's.
    """
    if colour in (NOTHING, REJECTION):
        return
    name, _, layer = colour.partition("@")
    loaded = next((one for one in service.visible(key) if one.name == name), None)
    if loaded is None:
        raise Refusal(404, "there is no such steering any more")
    for side in sides:
        if side.done is not None and side.ids and colour not in side.cosines:
            if len(side.prompt) + len(side.ids) > LONGEST:  # read in one pass, while everybody waits
                raise TrimtabError(f"answers in chats of more than {LONGEST} tokens aren't coloured; start a new chat")
            job = partial(answer_cosines, service.lm, loaded.steering, side.prompt, side.ids, int(layer))
            side.cosines[colour] = await asyncio.wrap_future(service.scheduler.run(job))


def full_of(sides: Sequence[Side], colour: str) -> float:
    """The cosine that has the full colour in all these answers."""
    found = [side.cosines[colour] for side in sides if colour in side.cosines]
    return reach(found) if found else 1.0


def coloured(service: Service, side: Side, colour: str, full: float) -> str:
    """The answer as HTML."""
    if colour == REJECTION and side.done is not None and side.done.trace is not None:
        return "".join(trace_spans(service.lm.tokenizer, side.ids, side.done.trace))
    if colour in side.cosines:
        return cosine_spans(side.cosines[colour], full)
    return html.escape(side.text)


def key_of(sides: Sequence[Side], colour: str, full: float) -> str:
    """What the colours stand for, as HTML."""
    if colour == REJECTION:
        return TRACE_KEY if any(side.done and side.done.trace for side in sides) else NO_TRACE
    if any(colour in side.cosines for side in sides):
        return f"<span>Cosine of each token's activation, read unsteered:</span> {cosine_key(full)}"
    return ""
