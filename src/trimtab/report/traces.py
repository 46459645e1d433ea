"""What rejection did at each token of an answer: as colored text, and as a self-contained page."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from trimtab.decoding.trace import Step, Trace
from trimtab.text.pieces import pieces as pieces

if TYPE_CHECKING:
    from rich.text import Text

    from trimtab.engines.transformers.generate import Generation
    from trimtab.text.chat import Prompt
from trimtab.text.images import text_of

STYLES = {"shut": "", "steered": "green", "weakened": "yellow", "rejected": "red"}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Traces of rejection</title><style>
body { font: 16px/1.6 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
.answer, .prompt { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: #666; border-left: 3px solid #ddd;
padding-left: .8rem; } .steered { background: #d5ecd4; } .weakened { background: #f7eab5; }
.rejected { background: #f6cfcb; } .changed { border-bottom: 2px solid #222; } small { color: #666; }
@media (prefers-color-scheme: dark) { body { background: #1b1b1b; color: #ddd; } .changed { border-color: #ddd; }
.steered { background: #2c4a2b; } .weakened { background: #564a17; } .rejected { background: #5c2a25; } }
</style></head><body>
<h1>Traces of rejection</h1>
<p><span class="steered">steered by the strongest candidate</span> · <span class="weakened">by a weaker one</span> ·
<span class="rejected">every candidate was rejected</span> ·
<span class="changed">different from the unsteered model's</span>
· plain: no other token was plausible, so steering wasn't tried. Hold the pointer over a token for details.</p>
%s
</body></html>
"""


def kind_of(step: Step) -> str:
    """`"shut"`, `"steered"` (by the strongest candidate), `"weakened"` (by another) or `"rejected"`."""
    if not step.open:
        return "shut"
    return "rejected" if step.candidate is None else "weakened" if step.candidate else "steered"


def coloured(tokenizer: Any, answer: Generation) -> Text:
    """The answer for a terminal; tokens that differ from the unsteered model's are underlined."""
    from rich.text import Text

    text = Text()
    assert answer.trace is not None
    for piece, step in zip(pieces(tokenizer, answer.token_ids), answer.trace.steps, strict=True):
        style = f"{STYLES[kind_of(step)]}{' underline' if step.replaced is not None else ''}".strip()
        text.append(piece, style=style or None)
    return text


def trace_page(tokenizer: Any, prompts: Sequence[Prompt], answers: Sequence[Generation]) -> str:
    """A self-contained HTML page. Answers without a trace are shown plain."""
    parts = []
    for prompt, answer in zip(prompts, answers, strict=True):
        prompt_text = (
            prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {text_of(m['content'])}" for m in prompt)
        )
        parts.append(f'<div class="prompt">{html.escape(prompt_text)}</div>')
        shown = html.escape(answer.text)
        if answer.trace is not None:
            shown = "".join(trace_spans(tokenizer, answer.token_ids, answer.trace))
        parts.append(f'<p class="answer">{shown}</p>')
        if answer.trace is not None:
            trace = answer.trace
            parts.append(
                f"<small>{len(trace.steps)} tokens; steering tried at {trace.open_share:.0%},"
                f" {trace.changed_share:.0%} changed; {trace.passes} passes after the prompt's"
                f" ({html.escape(trace.schedule)})</small>"
            )
    return PAGE % "\n".join(parts)


def trace_spans(tokenizer: Any, ids: Sequence[int], trace: Trace) -> Iterator[str]:
    """The HTML of each token: its class is its `kind_of`, plus `changed` if it differs from the unsteered model's."""
    for piece, step in zip(pieces(tokenizer, ids), trace.steps, strict=True):
        kind = kind_of(step)
        if kind == "shut":
            yield html.escape(piece)
            continue
        names = kind + (" changed" if step.replaced is not None else "")
        outcome = (
            "every candidate was rejected"
            if step.candidate is None
            else f"candidate {step.candidate}: {trace.candidates[step.candidate]}"
        )
        raw = "" if step.replaced is None else f"; the unsteered model: {tokenizer.decode([step.replaced])!r}"
        yield f'<span class="{names}" title="{html.escape(outcome + raw, quote=True)}">{html.escape(piece)}</span>'
