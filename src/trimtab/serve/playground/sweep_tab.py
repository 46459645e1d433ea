"""The sweep: one prompt, one steering, several strengths and layers, and all answers streamed into a grid."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from trimtab.errors import TrimtabError
from trimtab.serve.playground import show
from trimtab.serve.playground.callers import caller, in_words
from trimtab.serve.playground.choices import panel_state, span_of
from trimtab.serve.playground.conversation import Conversation
from trimtab.serve.playground.panel import Panel
from trimtab.serve.playground.request_group import RequestGroup, Side
from trimtab.serve.playground.sweep import Sweep, sweep_of
from trimtab.serve.service import Service

EXAMPLE = "What makes a good friend?"
ABOUT = (
    "One message, answered at each strength, and at each layer if you name some: all answers are shown side by side."
    " The panel's steerings aren't used; its emphasis, length and system message are."
)


@dataclass(frozen=True)
class SweepTab:
    """The components that other parts of the page update."""

    name: Any


def make_sweep(service: Service, key: Any, panel: Panel) -> SweepTab:
    """The components and their event handlers."""
    running = gr.State(Conversation())
    low, high = span_of(*service.policy.strength)
    with gr.Row():
        name = gr.Dropdown([], label="Steering", min_width=160, elem_id="tt-sweep-name")
        strengths = gr.Textbox(
            _default(low, high), label="Strengths", info="0 is unsteered", min_width=160, elem_id="tt-strengths"
        )
        layers = gr.Textbox(label="Layers", info="empty: where it was learned", placeholder="8, 12, 16", min_width=160)
    with gr.Row(equal_height=True):
        prompt = gr.Textbox(
            EXAMPLE,
            label="Message",
            show_label=False,
            container=False,
            scale=6,
            max_lines=8,
            min_width=240,
            elem_id="tt-sweep-prompt",
        )
        go = gr.Button("Sweep", variant="primary", scale=0, min_width=90, elem_id="tt-sweep-go")
        stop = gr.Button("Stop", scale=0, min_width=70)
    trouble = gr.HTML(elem_classes="tt-say")
    grid = gr.HTML(show.note(ABOUT), elem_id="tt-grid")

    async def run(
        secret: str, steering: str, pushed: str, at: str, text: str, talk: Conversation, *values: Any
    ) -> AsyncIterator[list[Any]]:
        try:
            if not (text or "").strip():
                raise TrimtabError("type a message first")
            mine, sweep = caller(service, secret), sweep_of(steering, pushed or "", at or "")
            group = RequestGroup(service, mine, sweep.requests(service, panel_state(values), text.strip()))
            number = talk.begin(group)
            async with aclosing(group.run()) as coming:
                async for sides in coming:
                    if talk.number != number:
                        return
                    yield [show.grid(_rows(sweep, sides)), ""]
            yield [show.grid(_rows(sweep, group.sides)), ""]
        except Exception as error:
            yield [gr.skip(), show.error(in_words(error))]

    quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    inputs = [key, name, strengths, layers, prompt, running, *panel.inputs]
    for event in (go.click, prompt.submit, strengths.submit, layers.submit):
        event(run, inputs, [grid, trouble], trigger_mode="multiple", **quick)
    stop.click(lambda talk: talk.stop(), running, None, **quick)
    return SweepTab(name)


def _rows(sweep: Sweep, sides: list[Side]) -> list[tuple[str, list[tuple[str, Side]]]]:
    """The grid's rows: a title, and the cells with their titles."""
    wide = len(sweep.strengths)
    cells = [(f"{strength:g}", side) for strength, side in zip(sweep.strengths * len(sweep.layers), sides, strict=True)]
    return [(title, cells[row * wide : (row + 1) * wide]) for row, title in enumerate(sweep.rows())]


def _default(low: float, high: float) -> str:
    """A few strengths within the allowed range."""
    wanted = [value for value in (-2, -1, 0, 1, 2) if low <= value <= high or value == 0]
    return ", ".join(f"{value:g}" for value in wanted)
