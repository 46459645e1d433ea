"""Making a steering from a sentence that a user typed: the request, the progress, and the verdict."""

from __future__ import annotations

import html
from collections.abc import AsyncGenerator

from trimtab.errors import TrimtabError
from trimtab.making.make import STAGES
from trimtab.serve.making import Finished, Step, make_steering
from trimtab.serve.playground import show
from trimtab.serve.playground.callers import new_request_identity
from trimtab.serve.playground.learn_requests import OFF, download_link
from trimtab.serve.policy import Key
from trimtab.serve.refusals import Refusal
from trimtab.serve.schema_steerings import MakeRequest
from trimtab.serve.service import Service

SHOWN = 2
HIDDEN = "Answers aren't shown here: this server's policy would steer, cap or refuse them."
NEXT = "Try clearer words, or name an opposite after 'not'. Or tick the box to add it anyway, and try it."


def build_make_request(name: str, sentence: str, like: str, unlike: str, *, keep: bool) -> MakeRequest:
    """The API request. Raises `TrimtabError` if something is missing, and pydantic's `ValidationError`."""
    fields = {"idea": sentence.strip(), "like": like.strip(), "unlike": unlike.strip()}
    if fields["idea"] and (fields["like"] or fields["unlike"]):
        raise TrimtabError("give a sentence, or a persona and its opposite, not both")
    if fields["unlike"] and not fields["like"]:
        raise TrimtabError("also say whom the model should be like, such as: a pirate")
    if not fields["idea"] and not fields["like"]:
        raise TrimtabError("describe in a sentence what you want, such as: be blunt, not flattering")
    if not name.strip():
        raise TrimtabError("give the steering a name, such as blunt")
    filled = {key: value for key, value in fields.items() if value}
    return MakeRequest.model_validate({"name": name.strip(), **filled, "keep": keep})


def make(service: Service, key: Key, request: MakeRequest) -> AsyncGenerator[Step | Finished, None]:
    """Yield the progress, and at last the result.

    Raises `Refusal` if learning is off, and what `make_steering` raises.
    """
    if not service.learn:
        raise Refusal(403, OFF)
    return make_steering(service, key, new_request_identity(key), request)


def progress_html(step: Step) -> str:
    """The progress, as HTML; each stage counts the same."""
    if step.number == 0:
        return show.progress(0, f"{step.stage} …")
    share = (step.number - 1 + step.done / max(1, step.total)) / len(STAGES)
    words = f"{step.number} of {len(STAGES)}: {step.stage}"
    words += f", {step.done} of {step.total}" if step.done else " …"
    return show.progress(share, words) + show.note(step.said)


def make_result_html(name: str, finished: Finished) -> str:
    """The result and its verdict, as HTML, with answers side by side and a link to save the file."""
    loaded, verdict = finished.loaded, finished.made.verdict
    known = f"<strong>{html.escape(name)}</strong>"
    if loaded is None:
        summary = f"{known} wasn't added: {html.escape(verdict.why_not)}."
    else:
        summary = f"{known} was made and is selected on the panel" + ("." if verdict.holds else ", as you requested.")
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in [*verdict.lines(), f"chosen: {finished.made.name}"])
    pairs = "".join(
        show.two(example.question, example.unsteered, example.steered) for example in finished.examples[:SHOWN]
    )
    return (
        f'<div class="tt-lesson" role="status"><p>{summary}</p><ul class="tt-verdict">{lines}</ul>'
        f"{pairs or show.note(HIDDEN)}{show.note(NEXT) if loaded is None else download_link(loaded)}</div>"
    )
