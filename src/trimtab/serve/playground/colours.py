"""How answers are shown: formatted, as plain text, or by token, colored by rejection or by cosine."""

from __future__ import annotations

import asyncio
import html
from collections.abc import Sequence
from functools import partial

from trimtab.errors import TrimtabError
from trimtab.evaluate.ab import evenly_spaced
from trimtab.report.sweep import directions
from trimtab.report.tokens import answer_cosines, color_limit, cosine_legend, cosine_spans
from trimtab.report.traces import trace_spans
from trimtab.serve.playground.formatted import formatted
from trimtab.serve.playground.request_group import Side
from trimtab.serve.policy import Key
from trimtab.serve.refusals import Refusal
from trimtab.serve.service import Service

FORMATTED, NOTHING, REJECTION = "formatted", "nothing", "rejection"
LONGEST = 2048
MOST_LAYERS = 3
"""The most layers to offer of a steering at many layers."""

TRACE_KEY = (
    '<span class="steered">steered in full</span> <span class="weakened">steered more weakly</span>'
    ' <span class="rejected">steering left out</span> <span class="changed">not the unsteered word</span>'
    " <span>plain: nothing steered here</span>"
)
COSINES = "Cosine of each token's unsteered activation with the steering's vector:"
NO_TRACE = (
    "No answer here was generated with rejection. It is on when something is emphasized, or always if you choose that"
    " under “Hold steering back”."
)
PLAIN = [("formatted", FORMATTED), ("as plain text", NOTHING), ("colored by where steering was held back", REJECTION)]
"""Ways to show answers that need no steering."""


def display_modes(service: Service, key: Key) -> list[tuple[str, str]]:
    """The ways to show answers, as (label, value); the value for colors by a vector is `name@layer`."""
    modes = list(PLAIN)
    for loaded in service.visible(key):
        try:
            layers = sorted(directions(loaded.steering))
        except TrimtabError:
            continue
        sites = {edit.site.layer for edit in loaded.steering.edits if edit.site.kind == "residual"}
        shown = evenly_spaced([layer for layer in layers if layer in sites], MOST_LAYERS)
        modes += [(f"colored by {loaded.name}, layer {layer}", f"{loaded.name}@{layer}") for layer in shown]
    return modes


async def compute_cosines(service: Service, key: Key, sides: Sequence[Side], colour: str) -> None:
    """Compute the missing cosines, between two steps of the batch.

    Raises `Refusal` for a vector that doesn't exist, or isn't available to this key.
    """
    if colour in (FORMATTED, NOTHING, REJECTION):
        return
    name, _, layer = colour.partition("@")
    loaded = next((entry for entry in service.visible(key) if entry.name == name), None)
    if loaded is None:
        raise Refusal(404, f"there is no steering {name!r} any more")
    for side in sides:
        if side.done is not None and side.ids and colour not in side.cosines:
            if len(side.prompt) + len(side.ids) > LONGEST:  # computed in one pass, while everybody waits
                raise TrimtabError(f"answers in chats of more than {LONGEST} tokens aren't colored; start a new chat")
            job = partial(answer_cosines, service.lm, loaded.steering, side.prompt, side.ids, int(layer))
            side.cosines[colour] = await asyncio.wrap_future(service.scheduler.run(job))


def shared_color_limit(sides: Sequence[Side], colour: str) -> float:
    """The cosine that gets the full color in all these answers."""
    cosines = [side.cosines[colour] for side in sides if colour in side.cosines]
    return color_limit(cosines) if cosines else 1.0


def coloured(service: Service, side: Side, colour: str, full: float) -> str:
    """The answer as HTML."""
    if colour == FORMATTED:
        return formatted(side.text)
    if colour == REJECTION and side.done is not None and side.done.trace is not None:
        return "".join(trace_spans(service.lm.tokenizer, side.ids, side.done.trace))
    if colour in side.cosines:
        return cosine_spans(side.cosines[colour], full)
    return html.escape(side.text)


def legend_html(sides: Sequence[Side], colour: str, full: float) -> str:
    """The legend of the colors, as HTML."""
    if colour == REJECTION:
        return TRACE_KEY if any(side.done and side.done.trace for side in sides) else NO_TRACE
    if any(colour in side.cosines for side in sides):
        return f"<span>{COSINES}</span> {cosine_legend(full)}"
    return ""
