"""The upper part of the Learn tab: a sentence or a persona, a name, and the progress of making the steering."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import gradio as gr

from trimtab.serve.making import Finished
from trimtab.serve.playground import show
from trimtab.serve.playground.callers import caller, in_words
from trimtab.serve.playground.make_requests import build_make_request, make, make_result_html, progress_html
from trimtab.serve.service import Service

ABOUT = (
    "Describe what the model should do. It answers questions for and against that; the difference is learned, and its"
    " effect is measured on other questions. This takes a few minutes, during which everybody else waits; closing the"
    " page stops it."
)


def make_from_sentence(service: Service, key: Any, learned: Any) -> None:
    """The components and their event handlers. `learned` is set to the name of the added steering."""
    gr.HTML(show.note(ABOUT))
    sentence = gr.Textbox(
        label="A sentence",
        info="What you want, optionally with its opposite after 'not'",
        placeholder="be blunt, not flattering",
        max_lines=4,
        max_length=500,
        elem_id="tt-sentence",
    )
    with gr.Row():
        like = gr.Textbox(
            label="Or like",
            info="A persona instead of a sentence",
            placeholder="a tired poet",
            max_length=200,
            min_width=180,
            elem_id="tt-like",
        )
        unlike = gr.Textbox(
            label="And unlike",
            info="Optional; default: an ordinary assistant",
            placeholder="an office clerk",
            max_length=200,
            min_width=180,
            elem_id="tt-unlike",
        )
    with gr.Row():
        name = gr.Textbox(label="Name of the steering", placeholder="pirate", min_width=140, elem_id="tt-make-name")
        keep = gr.Checkbox(label="Add it even if the verdict is negative", min_width=160, elem_id="tt-make-keep")
    go = gr.Button("Make", variant="primary", elem_id="tt-make")
    trouble = gr.HTML(elem_classes="tt-say")
    result = gr.HTML(elem_id="tt-made", elem_classes="tt-say")

    async def create(
        secret: str, wanted: str, who: str, other: str, called: str, anyway: bool
    ) -> AsyncIterator[list[Any]]:
        try:
            mine = caller(service, secret)
            request = build_make_request(called or "", wanted or "", who or "", other or "", keep=bool(anyway))
            async with aclosing(make(service, mine, request)) as steps:
                async for step in steps:
                    if isinstance(step, Finished):
                        added = gr.skip() if step.loaded is None else step.loaded.name
                        yield [make_result_html(request.name, step), "", added]
                    else:
                        yield [progress_html(step), "", gr.skip()]
        except Exception as error:
            yield ["", show.error(in_words(error)), gr.skip()]

    quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    for event in (go.click, sentence.submit, like.submit, unlike.submit, name.submit):
        event(create, [key, sentence, like, unlike, name, keep], [result, trouble, learned], **quick)
