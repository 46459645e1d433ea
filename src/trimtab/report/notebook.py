"""How notebooks show a steering, cosines, a card, an answer and a sweep: HTML to embed in a page.

It is self-contained: no scripts, nothing is fetched, all text is escaped, and the colors suit light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.report.described import card_rows, edit_columns, origin

if TYPE_CHECKING:
    from trimtab.decoding.trace import Step, Trace
    from trimtab.engines.answer import Generation
    from trimtab.steering import Card, Steering
    from trimtab.tune.sweep import Sweep, SweepRow

BAR = "rgba(51,101,138,.75)"
AGAINST = "rgba(184,62,48,.75)"
"""The color of a bar below 0."""
BAR_WIDTH = 120
"""The length of the longest bar, in pixels."""
CELL = "text-align: {side}; padding: .1rem .8rem .1rem 0; vertical-align: top; white-space: {wraps}"
LONG = 30
"""Text of more characters than this is wrapped."""
TABLE = '<div style="overflow-x: auto"><table style="margin: 0 0 .5em">'
"""Left-aligned, where notebooks would center it; a table that is too wide scrolls by itself."""
SHADES = {
    "steered": "rgba(60,160,70,.3)",
    "weakened": "rgba(225,185,30,.35)",
    "rejected": "rgba(200,60,50,.32)",
}
UNLIKELY = (184, 62, 48)
KEY = (
    "green: steered by the strongest candidate; yellow: by a weaker one; red: every candidate was rejected; underlined:"
    " different from the unsteered model's; plain: no other token was plausible, so steering wasn't tried"
)


def steering_html(steering: Steering) -> str:
    """The steering's origin, what its edits share, and a table of them with a bar for the norm of each push."""
    from trimtab.report.pushes import pushes

    title = f"<p><b>Steering</b>: {escape(origin(steering.card))}</p>"
    if not steering.edits:
        return title + "<p>no edits: it does nothing</p>"
    try:
        edit_pushes = pushes(steering)
    except UnsupportedError:  # attention has no direction, so there is no push to show
        layers = [str(edit.site.layer) for edit in steering.edits]
        return title + table({"layer": layers, "edit": [str(edit) for edit in steering.edits]}, words=("edit",))
    line, columns = edit_columns(steering, edit_pushes)
    longest = max(push.norm for push in edit_pushes)
    shown = {
        "layer": [str(edit.site.layer) for edit in steering.edits],
        "norm": [f"{push.norm:.4g}" for push in edit_pushes],
        " ": [_bar(push.norm, longest) for push in edit_pushes],
        **columns,
    }
    return f"{title}<p>{escape(line)}</p>{table(shown, words=('operation', 'at', 'when'), raw=(' ',))}"


def cosines_html(cosines: Mapping[int, float]) -> str:
    """A table with one row per layer, with a bar for the cosine: blue above 0 and red below."""
    columns = {
        "layer": [str(layer) for layer in cosines],
        "cosine": [f"{cosine:+.3f}" for cosine in cosines.values()],
        " ": [_bar(abs(cosine), 1.0, BAR if cosine > 0 else AGAINST) for cosine in cosines.values()],
    }
    return table(columns, raw=(" ",))


def card_html(card: Card) -> str:
    """The card as a table, followed by those of its parts."""
    rows = [("method", origin(card)), *card_rows(card)]
    body = "".join(
        f'<tr><th style="{_cell("left")}; font-weight: normal; opacity: .65">{escape(name)}</th>'
        f'<td style="{_cell("left", wraps=len(value) > LONG)}; overflow-wrap: anywhere">{escape(value)}</td></tr>'
        for name, value in rows
    )
    parts = "".join(f"<p>part {number}</p>{card_html(part)}" for number, part in enumerate(card.parts, 1))
    return f"{TABLE}{body}</table></div>{parts}"


def generation_html(answer: Generation) -> str:
    """The answer with its tokens colored by the trace or by log-probabilities, and what steered it."""
    text = escape(answer.text)
    key = ""
    if answer.pieces is not None and answer.trace is not None:
        text, key = _traced(answer.pieces, answer.trace), KEY
    elif answer.pieces is not None and answer.logprobs is not None:
        text, key = _likely(answer.pieces, answer.logprobs), "the redder, the less likely under the model"
    end = "cut off by the token limit" if answer.finish_reason == "length" else "ended by itself"
    facts = [f"{len(answer.token_ids)} tokens, {end}", _steered(answer), *([key] if key else [])]
    return (
        f'<div style="white-space: pre-wrap; overflow-wrap: anywhere; text-align: left; line-height: 1.6">{text}</div>'
        f'<p style="opacity: .65; text-align: left">{escape("; ".join(facts))}</p>{_doses(answer)}'
    )


def stream_html(text: str, state: str) -> str:
    """The part of an answer that has been generated, and whether more will come."""
    return (
        f'<div style="white-space: pre-wrap; overflow-wrap: anywhere; text-align: left">{escape(text)}</div>'
        f'<p style="opacity: .65; text-align: left">{escape(state)}</p>'
    )


def sweep_html(sweep: Sweep) -> str:
    """A table with one row per layer and strength; the unsteered model comes first, and the best row is bold."""
    rows = [sweep.unsteered, *sweep.rows]
    checked = sweep.unsteered.passed is not None
    columns = {
        "layer": ["unsteered" if row.layer is None else str(row.layer) for row in rows],
        "strength": ["" if row.layer is None else f"{row.strength:g}" for row in rows],
        "passed": [f"{row.passed:.2f}" if row.passed is not None else "" for row in rows],
        " ": [_bar(max(0.0, row.passed or 0.0), _most(rows)) for row in rows],
        "dose": ["" if math.isnan(row.dose) else f"{row.dose:.2f}" for row in rows],
        "repeated": [f"{row.repeated:.0%}" for row in rows],
        "perplexity": ["" if row.perplexity is None else f"{row.perplexity:.3g}" for row in rows],
        "breaks": ["; ".join(row.broken) for row in rows],
    }
    if not checked:
        del columns["passed"], columns[" "]
    if not any(columns["breaks"]):
        del columns["breaks"]
    strong = None
    if checked:
        try:
            strong = rows.index(sweep.best())
        except TrimtabError:  # nothing is better than not steering
            strong = 0
    count = f"{len(sweep.prompts)} prompt{'' if len(sweep.prompts) == 1 else 's'}"
    note = "; bold: the best that breaks no limit" if checked else ""
    shown = table(columns, words=("breaks",), raw=(" ",) if checked else (), strong=strong)
    return f"<p>{count}, {len(sweep.rows)} settings{note}</p>{shown}"


def _most(rows: Sequence[SweepRow]) -> float:
    return max(row.passed or 0.0 for row in rows)


def table(
    columns: dict[str, list[str]], *, words: Sequence[str] = (), raw: Sequence[str] = (), strong: int | None = None
) -> str:
    """An HTML table of columns by name, those of `words` left-aligned. `raw` columns are HTML; row `strong` is bold."""
    styles = {
        name: _cell(
            "left" if name in words or name in raw else "right",
            wraps=name in words and max(map(len, cells), default=0) > LONG,
        )
        for name, cells in columns.items()
    }
    head = "".join(
        f'<th style="{style}; font-weight: normal; opacity: .65">{escape(name)}</th>' for name, style in styles.items()
    )
    rows = []
    for number, cells in enumerate(zip(*columns.values(), strict=True)):
        weight = "; font-weight: bold" if number == strong else ""
        rows.append(
            "<tr>"
            + "".join(
                f'<td style="{style}{weight}">{cell if name in raw else escape(cell)}</td>'
                for (name, style), cell in zip(styles.items(), cells, strict=True)
            )
            + "</tr>"
        )
    return f"{TABLE}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _cell(side: str, *, wraps: bool = False) -> str:
    return CELL.format(side=side, wraps=f"normal; min-width: {LONG / 2:g}em" if wraps else "nowrap")


def _bar(value: float, longest: float, color: str = BAR) -> str:
    width = round(BAR_WIDTH * value / longest) if longest > 0 else 0
    return f'<div style="width: {width}px; height: .7em; margin-top: .25em; background: {color}"></div>'


def _steered(answer: Generation) -> str:
    edits = answer.applied.edits
    if not edits:
        return "unsteered"
    more = f" and {len(edits) - 2} more" if len(edits) > 2 else ""
    return f"steered: {'; '.join(edits[:2])}{more}"


def _doses(answer: Generation) -> str:
    doses = answer.applied.doses
    if not doses:
        return ""
    longest = max(dose.ratio for dose in doses)
    columns = {
        "site": [f"{dose.kind}[{dose.layer}]" for dose in doses],
        "dose": [f"{dose.ratio:.3g}" for dose in doses],
        " ": [_bar(dose.ratio, longest) for dose in doses],
        "tokens": [str(dose.tokens) for dose in doses],
    }
    return table(columns, words=("site",), raw=(" ",))


def _traced(pieces: Sequence[str], trace: Trace) -> str:
    return "".join(_step(piece, step, trace) for piece, step in zip(pieces, trace.steps, strict=True))


def _step(piece: str, step: Step, trace: Trace) -> str:
    from trimtab.report.traces import kind_of

    kind = kind_of(step)
    if kind == "shut":
        return escape(piece)
    line = "; border-bottom: 2px solid currentColor" if step.replaced is not None else ""
    outcome = (
        "every candidate was rejected"
        if step.candidate is None
        else f"candidate {step.candidate}: {trace.candidates[step.candidate]}"
    )
    return f'<span style="background: {SHADES[kind]}{line}" title="{escape(outcome)}">{escape(piece)}</span>'


def _likely(pieces: Sequence[str], logprobs: Sequence[float]) -> str:
    red, green, blue = UNLIKELY
    spans = []
    for piece, logprob in zip(pieces, logprobs, strict=True):
        share = math.exp(min(0.0, logprob))
        shade = f"rgba({red},{green},{blue},{0.7 * (1 - share):.2f})"
        spans.append(f'<span style="background: {shade}" title="probability {share:.3g}">{escape(piece)}</span>')
    return "".join(spans)
