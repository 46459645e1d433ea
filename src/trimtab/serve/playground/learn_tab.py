"""Learning from a sentence, or from pairs typed, pasted or dropped in; progress; and the steering, to use and save."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from trimtab.serve.playground import show
from trimtab.serve.playground.callers import caller, in_words
from trimtab.serve.playground.learn_requests import (
    METHODS,
    OFF,
    LearnResult,
    as_row,
    build_learn_request,
    learn,
    learn_result_html,
)
from trimtab.serve.playground.make_part import make_from_sentence
from trimtab.serve.service import Service

ABOUT = (
    "A steering is the difference between two sides of many pairs: what the model should say, and what it shouldn't."
    " A dozen pairs show an effect, a hundred are better."
)
SHAPES = """{"prompt": "How are you?", "positive": "Splendid, thank you!", "negative": "Go away."}
{"prompt": "Can you help me?", "positive": "With pleasure.", "negative": "No."}"""
FILE = (
    '<label class="tt-file" for="tt-file">Or drop a file on the box, or choose one (JSONL, JSON or CSV):'
    '<input type="file" id="tt-file" accept=".jsonl,.json,.csv,.ndjson,.txt"></label>'
)


@dataclass(frozen=True)
class LearnTab:
    """`learned` holds the name of the steering that was learned or made last."""

    learned: Any


def make_learn(service: Service, key: Any) -> LearnTab:
    """The components and their event handlers."""
    learned = gr.State("")
    if not service.learn:
        gr.HTML(show.note(OFF))
    with gr.Column(visible=service.learn):
        make_from_sentence(service, key, learned)
        gr.HTML(f'<h2 class="tt-or">Or from pairs</h2>{show.note(ABOUT)}')
        pairs = gr.Textbox(
            label="Pairs, one per line",
            info="JSONL, JSON or CSV: prompt, positive, negative; or prompt, prompt_without_instruction",
            placeholder=SHAPES,
            lines=7,
            max_lines=14,
            elem_id="tt-pairs",
        )
        gr.HTML(FILE)
        with gr.Accordion("Add a pair by typing", open=False):
            with gr.Row():
                prompt = gr.Textbox(label="Prompt", info="may be empty", min_width=180, elem_id="tt-pair-prompt")
                wanted = gr.Textbox(
                    label="Should say", info="the positive side", min_width=180, elem_id="tt-pair-positive"
                )
                other = gr.Textbox(
                    label="Should not", info="Enter adds the pair", min_width=180, elem_id="tt-pair-negative"
                )
            add = gr.Button("Add the pair", elem_id="tt-pair-add")
        with gr.Row():
            name = gr.Textbox(label="Name", placeholder="polite", min_width=140, elem_id="tt-name")
            method = gr.Dropdown(list(METHODS), value=METHODS[0], label="Method", min_width=220)
            layers = gr.Textbox(
                label="Layers", placeholder="the method's own", min_width=120, elem_id="tt-learn-layers"
            )
        go = gr.Button("Learn", variant="primary", elem_id="tt-learn")
    trouble = gr.HTML(elem_classes="tt-say")
    result = gr.HTML(elem_id="tt-lesson", elem_classes="tt-say")

    def append(before: str, opening: str, positive: str, negative: str) -> list[Any]:
        try:
            row = as_row(opening or "", positive or "", negative or "")
        except Exception as error:
            return [gr.skip()] * 4 + [show.error(in_words(error))]
        return [f"{before.rstrip()}\n{row}".lstrip(), "", "", "", ""]

    async def study(secret: str, text: str, called: str, how: str, at: str) -> AsyncIterator[list[Any]]:
        try:
            mine = caller(service, secret)
            async for step in learn(service, mine, build_learn_request(called or "", how, text or "", at or "")):
                if isinstance(step, LearnResult):
                    yield [learn_result_html(step), "", step.loaded.name]
                else:
                    done, total = step
                    yield [show.progress(done / max(1, total), f"{done} of {total} pairs read"), "", gr.skip()]
        except Exception as error:
            yield ["", show.error(in_words(error)), gr.skip()]

    quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    for event in (add.click, other.submit):
        event(append, [pairs, prompt, wanted, other], [pairs, prompt, wanted, other, trouble], **quick)
    one_at_a_time: dict[str, Any] = {**quick, "concurrency_limit": 1, "concurrency_id": "learn"}
    for event in (go.click, name.submit):
        event(study, [key, pairs, name, method, layers], [result, trouble, learned], **one_at_a_time)
    return LearnTab(learned)
