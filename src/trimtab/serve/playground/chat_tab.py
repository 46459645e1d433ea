"""The chat: each message goes to both sides, and both answers stream in side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from trimtab.errors import TrimtabError
from trimtab.serve.playground import show
from trimtab.serve.playground.callers import caller, in_words
from trimtab.serve.playground.choices import PanelState, is_chat_model, panel_state, prompt_of, request
from trimtab.serve.playground.colours import FORMATTED, NOTHING, PLAIN, compute_cosines
from trimtab.serve.playground.conversation import Conversation, Turn
from trimtab.serve.playground.examples import SHOWN, examples
from trimtab.serve.playground.marks import find_marks
from trimtab.serve.playground.panel import Panel, nameable, slot_updates
from trimtab.serve.playground.request_group import RequestGroup
from trimtab.serve.playground.snippets import as_curl, as_python
from trimtab.serve.service import Service

EXAMPLE = "Name three rivers."
MOST_TURNS = 100
DEBOUNCE_SECONDS = 0.3
"""Seconds without a move after which a slider counts as settled."""
COUNTED = "(key, move, ...rest) => [key, (window.trimtabMoves = (window.trimtabMoves ?? 0) + 1), ...rest]"
"""JavaScript: numbers a slider's moves as they are made, since they reach the server in any order."""


@dataclass(frozen=True)
class Chat:
    """The components that other parts of the page update."""

    colour: Any
    transcript: Any
    conversation_state: Any
    proposed: list[Any]


def make_chat(service: Service, key: Any, panel: Panel) -> Chat:
    """The components and their event handlers."""
    talk_state = gr.State(Conversation())
    move = gr.Number(0, precision=0, visible=False)
    transcript = gr.HTML(show.welcome(service, None), elem_id="tt-talk")
    with gr.Row(elem_id="tt-examples"):
        proposed = [gr.Button(visible=False, min_width=160, elem_classes="tt-example") for _ in range(SHOWN)]
    trouble = gr.HTML(elem_classes="tt-say")
    with gr.Row(equal_height=True):
        message = gr.Textbox(
            show_label=False,
            container=False,
            label="Message",
            placeholder="Your message",
            lines=1,
            max_lines=8,
            scale=6,
            min_width=200,
            elem_id="tt-message",
        )
        send = gr.Button("Send", variant="primary", scale=0, min_width=90, elem_id="tt-send")
        stop = gr.Button("Stop", variant="stop", scale=0, min_width=70, elem_id="tt-stop")
    with gr.Row(equal_height=True, elem_classes="tt-tools"):
        colour = gr.Dropdown(
            PLAIN,
            value=FORMATTED,
            label="Show answers",
            filterable=False,
            scale=2,
            min_width=180,
            elem_id="tt-colour",
        )
        live = gr.Checkbox(True, label="Answer again when a slider moves", scale=2, min_width=240, elem_id="tt-live")
        clear = gr.Button("New chat", scale=0, min_width=110, size="sm", elem_id="tt-clear")
    with gr.Accordion("The request, to copy", open=False):
        plain: dict[str, Any] = {"wrap_lines": True, "show_line_numbers": False}
        curl = gr.Code(language="shell", label="curl", interactive=False, **plain, elem_id="tt-curl")
        python = gr.Code(language="python", label="Python", interactive=False, **plain, elem_id="tt-python")

    async def answer(
        number: int, group: RequestGroup, talk: Conversation, tint: str, first: list[Any]
    ) -> AsyncGenerator[list[Any], None]:
        """Yield the conversation as the answers come, until another request. `first`: the message box and errors."""
        try:
            async with aclosing(group.run()) as coming:
                async for _ in coming:
                    if talk.number != number:
                        return
                    yield [show.conversation_html(service, talk, _interim_mode(tint)), *first]
        finally:
            if talk.running is group:
                talk.running = None
        await _compute_cosines(service, group, talk, tint)
        if talk.number == number:
            yield [show.conversation_html(service, talk, tint), *first]

    async def speak(
        secret: str, text: str, talk: Conversation, tint: str, *values: Any
    ) -> AsyncGenerator[list[Any], None]:
        try:
            text = _checked(text)
            if len(talk.turns) >= MOST_TURNS:
                raise TrimtabError(f"this chat has {MOST_TURNS} messages; start a new one")
            mine, choice = caller(service, secret), panel_state(values)
            plain = request(
                service, choice, prompt_of(service, choice, talk.history(steered=False), text), steered=False
            )
            steered = request(service, choice, prompt_of(service, choice, talk.history(steered=True), text))
            group = RequestGroup(service, mine, [plain, steered])
            turn = Turn(text, choice.phrases, *group.sides)
            started = False
            number = talk.begin(group)
            async with aclosing(answer(number, group, talk, tint, ["", ""])) as coming:
                async for update in coming:
                    if not started:  # accepted: now it is part of the conversation
                        started = True
                        talk.turns.append(turn)
                        update[0] = show.conversation_html(service, talk, _interim_mode(tint))
                    yield update
        except Exception as error:
            yield [show.conversation_html(service, talk, tint), gr.update(), show.error(in_words(error))]

    async def regenerate(
        secret: str, move: int, talk: Conversation, tint: str, on: bool, *values: Any
    ) -> AsyncGenerator[list[Any], None]:
        """Answer the last message again, on the steered side only: the user moved a slider, for the `move`-th time."""
        if not (on and talk.turns):
            yield [gr.skip(), gr.skip(), gr.skip()]
            return
        turn = talk.turns[-1]
        talk.moves = max(move, talk.moves)
        await asyncio.sleep(DEBOUNCE_SECONDS)
        if move < talk.moves or turn is not talk.turns[-1]:  # the slider has moved again
            yield [gr.skip(), gr.skip(), gr.skip()]
            return
        try:
            mine, choice = caller(service, secret), panel_state(values)
            history = talk.history(steered=True, before=len(talk.turns) - 1)
            group = RequestGroup(
                service, mine, [request(service, choice, prompt_of(service, choice, history, turn.text))]
            )
            number = talk.begin(group)
            async with aclosing(answer(number, group, talk, tint, [gr.skip(), ""])) as coming:
                async for update in coming:
                    if turn.steered is not group.sides[0]:
                        turn.steered, turn.phrases = group.sides[0], choice.phrases
                        update[0] = show.conversation_html(service, talk, _interim_mode(tint))
                    yield update
        except Exception as error:
            yield [show.conversation_html(service, talk, tint), gr.skip(), show.error(in_words(error))]

    async def tinted(secret: str, talk: Conversation, tint: str) -> list[Any]:
        try:
            sides = [side for turn in talk.turns for side in (turn.plain, turn.steered)]
            await compute_cosines(service, caller(service, secret), sides, tint)
            return [show.conversation_html(service, talk, tint), ""]
        except Exception as error:
            return [show.conversation_html(service, talk), show.error(in_words(error))]

    def halt(talk: Conversation) -> None:
        talk.stop()

    def forget(talk: Conversation) -> list[Any]:
        talk.stop()
        talk.number += 1
        talk.turns.clear()
        return [show.conversation_html(service, talk), ""]

    def propose(number: int) -> Any:
        """The handler of an example's button: chooses its steering, and fills in its message."""

        def pick(secret: str, previous_names: list[str], *values: Any) -> list[Any]:
            try:
                mine = caller(service, secret)
                example = examples(nameable(service, mine))[number]
                slots = slot_updates(service, mine, [example.steering], previous_names, values)
                return [[example.steering], example.message, "", *slots]
            except Exception as error:
                return [gr.skip(), gr.skip(), show.error(in_words(error)), *[gr.skip()] * len(panel.slot_outputs)]

        return pick

    def find_phrases(secret: str, text: str, talk: Conversation, *values: Any) -> str:
        """Whether the phrases are in the current prompt: in the typed text, or in the conversation so far."""
        try:
            caller(service, secret)
            choice = panel_state(values)
            wanted = choice.phrases
            if not wanted or not ((text or "").strip() or talk.turns):
                return show.note("The phrases are looked for in your message.") if wanted else ""
            return show.marks(
                find_marks(service, _next_prompt(service, choice, talk, text), wanted, chat=is_chat_model(service))
            )
        except Exception as error:
            return show.error(in_words(error))

    def request_snippets(secret: str, here: gr.Request, text: str, talk: Conversation, *values: Any) -> list[str]:
        try:
            caller(service, secret)
            choice = panel_state(values)
            steered_request = request(service, choice, _next_prompt(service, choice, talk, text or ""))
            assert here.request is not None  # Gradio passes it to the page's handlers
            address, keys = str(here.request.base_url).rstrip("/"), bool(service.policy.keys)
            return [as_curl(steered_request, address, keys=keys), as_python(steered_request, address, keys=keys)]
        except Exception as error:
            return [f"# {in_words(error)}", ""]

    quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    streams: dict[str, Any] = {**quick, "trigger_mode": "multiple"}
    shown = [transcript, message, trouble]
    for event in (message.submit, send.click):
        event(speak, [key, message, talk_state, colour, *panel.inputs], shown, **streams)
    for number, button in enumerate(proposed):
        picked = button.click(
            propose(number),
            [key, panel.previous_names, *panel.values],
            [panel.names, message, trouble, *panel.slot_outputs],
            **quick,
        )
        picked.then(speak, [key, message, talk_state, colour, *panel.inputs], shown, **streams)
    for event in (part for slot in panel.slots for part in (slot.strength.input, slot.layer.input)):
        event(regenerate, [key, move, talk_state, colour, live, *panel.inputs], shown, js=COUNTED, **streams)
    colour.change(tinted, [key, talk_state, colour], [transcript, trouble], **quick)
    stop.click(halt, talk_state, None, **quick)
    clear.click(forget, talk_state, [transcript, trouble], **quick)
    looking = [key, message, talk_state, *panel.inputs]
    for event in (panel.emphasis.change, message.blur):
        event(find_phrases, looking, panel.marks, **quick)
    changed = [*(part.change for part in panel.inputs), transcript.change, message.blur]
    gr.on(changed, request_snippets, looking, [curl, python], trigger_mode="always_last", **quick)
    return Chat(colour, transcript, talk_state, proposed)


def _interim_mode(tint: str) -> str:
    """How an answer is shown while it is generated: its tokens are colored once all of them are there."""
    return FORMATTED if tint == FORMATTED else NOTHING


async def _compute_cosines(service: Service, group: RequestGroup, talk: Conversation, tint: str) -> None:
    sides = [side for turn in talk.turns for side in (turn.plain, turn.steered)]
    await compute_cosines(service, group.key, sides, tint)


def _next_prompt(service: Service, choice: PanelState, talk: Conversation, text: str) -> Any:
    """The prompt that sending would use; after an answer, with nothing typed yet, that answer's prompt."""
    if (text or "").strip() or not talk.turns:
        return prompt_of(service, choice, talk.history(steered=True), (text or "").strip() or EXAMPLE)
    history = talk.history(steered=True, before=len(talk.turns) - 1)
    return prompt_of(service, choice, history, talk.turns[-1].text)


def _checked(text: str | None) -> str:
    if not (text or "").strip():
        raise TrimtabError("type a message first")
    return (text or "").strip()
