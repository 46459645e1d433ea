"""The page's HTML: a conversation in two columns, a grid of answers, phrases and where they are found, and errors.

All text by users or the model is escaped here.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from trimtab.report.traces import kind_of
from trimtab.serve.playground.colours import FORMATTED, coloured, legend_html, shared_color_limit
from trimtab.serve.playground.conversation import Conversation, Turn
from trimtab.serve.playground.formatted import formatted
from trimtab.serve.playground.marks import Mark
from trimtab.serve.playground.request_group import Side
from trimtab.serve.schema_output import AppliedSteering
from trimtab.serve.service import Service

WELCOME = """<div class="tt-welcome"><h2>The same model answers twice</h2>
<p>Once unsteered, and once steered: a steering pushes the model's activations in a learned direction while it writes.
Your message stays as you typed it.</p>{next}</div>"""
"""The text of an empty chat, whatever there is to choose from."""
CHOSEN = """<ol><li>A steering is selected under <b>Steerings</b>. Choose another one, or several.</li>
<li>Send one of the messages below, or your own.</li>
<li>Move the <b>strength</b> slider, and the steered answer is generated again.</li></ol>"""
"""Instructions for a first visit."""
NONE_YET = (
    """<p>There is no steering to choose yet: {ways}. Until then, you can emphasize phrases of your message.</p>"""
)
FOLDER = "start the server with a folder of them, <code>trimtab serve --steerings DIR</code>"
LISTING = "<p>Loading the steerings …</p>"
NEEDS_KEY = "<p>Enter your API key above: it decides which steerings you may choose from.</p>"
HELD_BACK = {"steered": "steered in full", "weakened": "steered more weakly", "rejected": "not steered"}
"""Labels for the kinds of steps with rejection."""


def error(words: str) -> str:
    """An error, which a screen reader announces at once; empty if there is no text."""
    return f'<p class="tt-error" role="alert">{html.escape(words[:1].upper() + words[1:])}</p>' if words else ""


def note(words: str) -> str:
    """A remark."""
    return f'<p class="tt-note">{html.escape(words)}</p>' if words else ""


def welcome(service: Service, names: Sequence[str] | None) -> str:
    """The text of an empty chat for a user who may choose from these steerings; `None`: not known yet."""
    if names is None:
        follows = NEEDS_KEY if service.policy.keys else LISTING
    elif names:
        follows = CHOSEN
    else:
        follows = NONE_YET.format(ways=f"learn one on the <b>Learn</b> tab, or {FOLDER}" if service.learn else FOLDER)
    return WELCOME.format(next=follows)


def conversation_html(service: Service, conversation: Conversation, colour: str = FORMATTED) -> str:
    """The conversation."""
    if not conversation.turns:
        return welcome(service, conversation.names)
    sides = [side for turn in conversation.turns for side in (turn.plain, turn.steered)]
    full = shared_color_limit(sides, colour)
    turns = "".join(_turn(service, turn, colour, full) for turn in conversation.turns)
    key = legend_html(sides, colour, full)
    return turns + (f'<p class="tt-key">{key}</p>' if key else "")


def _turn(service: Service, turn: Turn, colour: str, full: float) -> str:
    always = [steering.name for steering in turn.plain.steerings if steering.always]
    plain = f"Unsteered, except for {', '.join(always)}" if always else "Unsteered"
    chosen = [_named(steering) for steering in turn.steered.steerings if not steering.always]
    emphasized = [f"emphasis on “{phrase}”" for phrase in turn.phrases]
    steered = " + ".join(chosen + emphasized) or "nothing chosen"
    return (
        f'<section class="tt-turn"><h2 class="tt-you">{_marked(turn.text, turn.phrases)}</h2><div class="tt-two">'
        f"{_answer(service, turn.plain, plain, '', colour, full)}"
        f"{_answer(service, turn.steered, 'Steered', steered, colour, full, 'tt-steered')}</div></section>"
    )


def _named(steering: AppliedSteering) -> str:
    layer = "" if steering.layer is None else f" at layer {steering.layer}"
    return f"{steering.name} × {steering.strength:g}{layer}"


def _answer(
    service: Service, side: Side, title: str, how: str, colour: str, full: float, kind: str = "tt-plain"
) -> str:
    return _article(side, kind, title, how, coloured(service, side, colour, full), colour)


def _article(side: Side, kind: str, title: str, how: str, inner: str, colour: str = FORMATTED) -> str:
    """One answer. The page's script announces answers that are no longer busy to screen readers."""
    more = f" <small>{html.escape(how)}</small>" if how else ""
    shape = "tt-text tt-formatted" if colour == FORMATTED else "tt-text"
    busy = "false" if side.over else "true"
    return (
        f'<article class="tt-answer {kind}" data-number="{side.number}" aria-busy="{busy}">'
        f'<h3>{html.escape(title)}{more}</h3><div class="{shape}">{inner}{_caret(side)}</div>{_ending(side)}</article>'
    )


def _caret(side: Side) -> str:
    return "" if side.over else '<span class="tt-caret" aria-hidden="true"></span>'


def _ending(side: Side) -> str:
    """Why it ended, and what steered it."""
    if side.error:
        return error(side.error)
    if not side.over:
        return ""
    if side.done is None:
        return '<p class="tt-end">stopped</p>'
    done = side.done
    facts = [f"{done.tokens} token{'s' * (done.tokens != 1)}"]
    if done.finish == "length":
        facts.append("cut at the limit")
    if done.trace is not None:
        kinds = [kind_of(step) for step in done.trace.steps]
        facts += [f"{kinds.count(kind)} {words}" for kind, words in HELD_BACK.items() if kinds.count(kind)]
        facts.append(f"{sum(step.replaced is not None for step in done.trace.steps)} changed")
    elif done.applied.doses:
        hardest = max(done.applied.doses, key=lambda dose: dose.ratio)
        facts.append(f"pushed by {hardest.ratio:.0%} of the activation's length at layer {hardest.layer}")
    return f'<p class="tt-end">{" · ".join(facts)}</p>'


def _marked(text: str, phrases: Sequence[str]) -> str:
    """The text, with these phrases marked."""
    shown = html.escape(text)
    for phrase in sorted(phrases, key=len, reverse=True):
        escaped = html.escape(phrase)
        if "<mark>" not in shown or escaped not in shown[shown.index("<mark>") :]:
            shown = shown.replace(escaped, f"<mark>{escaped}</mark>")
    return shown


def two(question: str, plain: str, steered: str) -> str:
    """A question and two finished answers, side by side."""
    sides = (("tt-plain", "Unsteered", plain), ("tt-steered", "Steered", steered))
    answers = "".join(
        f'<article class="tt-answer {kind}"><h3>{title}</h3>'
        f'<div class="tt-text tt-formatted">{formatted(text)}</div></article>'
        for kind, title, text in sides
    )
    return (
        f'<section class="tt-turn"><h2 class="tt-you">{html.escape(question)}</h2>'
        f'<div class="tt-two">{answers}</div></section>'
    )


def marks(places: Sequence[Mark]) -> str:
    """Which phrases are in the prompt, and which aren't."""
    if not places:
        return ""
    items = "".join(
        f'<li class="tt-missing">{html.escape(mark.error)}</li>'
        if mark.error
        else f"<li>“{html.escape(mark.phrase)}”: found, {mark.tokens} token{'s' * (mark.tokens != 1)}</li>"
        for mark in places
    )
    return f'<ul class="tt-marks" aria-live="polite">{items}</ul>'


def grid(rows: Sequence[tuple[str, Sequence[tuple[str, Side]]]]) -> str:
    """A grid of answers: each row and each cell has a title."""
    parts = []
    for title, cells in rows:
        shown = "".join(
            _article(side, "tt-plain" if head == "0" else "tt-steered", f"strength {head}", "", formatted(side.text))
            for head, side in cells
        )
        heading = f"<h2>{html.escape(title)}</h2>" if title else ""
        parts.append(f'<section class="tt-row">{heading}<div class="tt-grid">{shown}</div></section>')
    return "".join(parts)


def progress(share: float, words: str) -> str:
    """A progress bar."""
    return (
        f'<p class="tt-note" role="status"><progress max="1" value="{share:.3f}" aria-label="progress"></progress>'
        f" {html.escape(words)}</p>"
    )
