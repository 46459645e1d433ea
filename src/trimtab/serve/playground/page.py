"""The page as a separate application: the server's guard forwards the page's requests to it."""

from __future__ import annotations

import html
import logging
from typing import Any

import gradio as gr
from fastapi import FastAPI

from trimtab.serve.playground import show
from trimtab.serve.playground.callers import caller, in_words
from trimtab.serve.playground.chat_tab import make_chat
from trimtab.serve.playground.choices import SLOTS
from trimtab.serve.playground.colours import display_modes
from trimtab.serve.playground.conversation import Conversation
from trimtab.serve.playground.examples import SHOWN, Example, default_steering, examples
from trimtab.serve.playground.learn_tab import make_learn
from trimtab.serve.playground.looks import options
from trimtab.serve.playground.page_app import STATE_CAPACITY, PageApp
from trimtab.serve.playground.panel import make_panel, nameable, slot_updates
from trimtab.serve.playground.sweep_tab import make_sweep
from trimtab.serve.reference import reference
from trimtab.serve.service import Service

WAITING = 256
"""The most clicks in the queue; the requests that they cause wait in the scheduler's own queue."""
LEARN = "learn one, or "
NO_ROUTES = "The routes are listed once you have entered your API key above."


def make_page(service: Service) -> PageApp:
    """The application that serves the page; its lifespan runs with the server's."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    page = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    settings = {"footer_links": [], "run_history": False, "show_error": False, "ssr_mode": False, "mcp_server": False}
    blocks = make_blocks(service)
    blocks.state_session_capacity = STATE_CAPACITY
    gr.mount_gradio_app(page, blocks, path="/", **settings, **options())
    return PageApp(page, blocks)


def make_blocks(service: Service) -> gr.Blocks:
    """The page's components and their event handlers."""
    keys = bool(service.policy.keys)
    with gr.Blocks(title="trimtab", analytics_enabled=False, fill_width=True) as blocks:
        head = gr.HTML(_head(""))
        with gr.Row(visible=keys, equal_height=True):
            key = gr.Textbox(
                label="API key",
                type="password",
                placeholder="this server asks for one",
                elem_id="tt-key",
                scale=4,
                autofocus=keys,
            )
            use = gr.Button("Use this key", scale=1, min_width=100, elem_id="tt-use")
        trouble = gr.HTML(elem_classes="tt-say")
        with gr.Row():
            with gr.Column(scale=2, min_width=280, elem_classes="tt-panel"):
                panel = make_panel(service)
            with gr.Column(scale=5, min_width=280), gr.Tabs():
                with gr.Tab("Chat"):
                    chat = make_chat(service, key, panel)
                with gr.Tab("Sweep"):
                    sweep = make_sweep(service, key, panel)
                with gr.Tab("Learn"):
                    lesson = make_learn(service, key)
                with gr.Tab("API"):
                    routes = gr.HTML(show.note(NO_ROUTES) if keys else "", elem_id="tt-routes")

        def refused(secret: str, error: Exception) -> str:
            """The error message; empty before a key is typed, since nothing has been requested then."""
            return "" if keys and not (secret or "").strip() else show.error(in_words(error))

        def arrive(
            secret: str, talk: Conversation, names: list[str], previous_names: list[str], *values: Any
        ) -> list[Any]:
            """Update the page for this key. `names` are the steerings chosen before."""
            try:
                mine = caller(service, secret)
            except Exception as error:
                talk.names = None
                hidden = [_button(None)] * SHOWN
                nothing = [gr.update(choices=[], value=[]), "", gr.update(), gr.update(), show.note(NO_ROUTES), *hidden]
                return [
                    _head(""),
                    refused(secret, error),
                    _empty(service, talk),
                    *nothing,
                    *(gr.update(),) * len(slots),
                ]
            known = nameable(service, mine)
            talk.names = tuple(known)
            chosen = [name for name in names or [] if name in known]
            kept = chosen or [name for name in [default_steering(known)] if name is not None]
            empty_text = f"There are no steerings yet: {LEARN * service.learn}start the server with --steerings DIR."
            proposed = examples(known)
            buttons = [_button(proposed[number] if number < len(proposed) else None) for number in range(SHOWN)]
            return [
                _head(service.lm.name, mine.name if keys else ""),
                "",
                _empty(service, talk),
                gr.update(choices=known, value=kept),
                show.note("" if known else empty_text),
                gr.update(choices=display_modes(service, mine)),
                gr.update(choices=known, value=kept[0] if kept else known[0] if known else None),
                reference(),
                *buttons,
                *slot_updates(service, mine, kept, previous_names, values),
            ]

        slots = panel.slot_outputs
        known_parts = [
            *(
                head,
                trouble,
                chat.transcript,
                panel.names,
                panel.empty_note,
                chat.colour,
                sweep.name,
                routes,
                *chat.proposed,
            ),
            *slots,
        ]
        values = [panel.names, panel.previous_names, *panel.values]
        inputs = [key, *values]
        quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        # one at a time, and always the last: an earlier key's choices never replace those of the current one
        gr.on(
            [blocks.load, use.click, key.submit],
            arrive,
            [key, chat.conversation_state, *values],
            known_parts,
            trigger_mode="always_last",
            **quick,
        )

        def choose(secret: str, names: list[str], previous_names: list[str], *values: Any) -> list[Any]:
            try:
                return ["", *slot_updates(service, caller(service, secret), names or [], previous_names, values)]
            except Exception as error:
                return [refused(secret, error), *(gr.update(),) * len(slots)]

        panel.names.change(choose, inputs, [trouble, *slots], **quick)

        def admit(
            secret: str, talk: Conversation, learned: str, names: list[str], previous_names: list[str], *values: Any
        ) -> list[Any]:
            """Also choose what was just learned, instead of the last one if all slots are taken."""
            other_names = [name for name in names or [] if name != learned][: SLOTS - 1]
            return arrive(secret, talk, [*other_names, learned] if learned else other_names, previous_names, *values)

        lesson.learned.change(admit, [key, chat.conversation_state, lesson.learned, *values], known_parts, **quick)
    blocks.queue(max_size=WAITING, default_concurrency_limit=None, api_open=False)
    return blocks


def _empty(service: Service, talk: Conversation) -> Any:
    """The text of an empty chat; a chat with turns isn't changed."""
    return gr.skip() if talk.turns else show.conversation_html(service, talk)


def _button(example: Example | None) -> Any:
    return gr.update(visible=example is not None, value="" if example is None else example.words)


def _head(model: str, key: str = "") -> str:
    whose = f" · key of {html.escape(key)}" if key else ""
    served = f"<p>{html.escape(model)}{whose}</p>" if model else ""
    return f'<div class="tt-head"><h1>trimtab</h1>{served}</div>'
