"""The README.md of a steering's repository, generated from its card."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trimtab.files.steering_file import describes, steering_digest
from trimtab.steering import Card, Operation, Steering
from trimtab.steering.attention import SCORE_NAMES, ScoreOperation
from trimtab.steering.operations import NAMES

LIBRARY = "trimtab"
TAGS = ("activation-steering", "steering-vector")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
TAG = re.compile(r"[\w.-]{1,40}", re.ASCII)
DEEPEST, LONGEST, MOST = 4, 120, 60


def steering_page(
    steering: Steering, name: str, *, file: str, base_model: str | None = None, license: str | None = None
) -> str:
    """The text of README.md: a header that the Hub reads, what the steering does, and what was measured.

    `base_model` is a Hub id; default: the name of the card's model, if that is one. `license` is the license of the
    data that the steering was learned from, as the Hub spells it (`apache-2.0`, `cc-by-4.0`).
    """
    card = steering.card
    models = [base_model] if base_model else [model.name for model in card.models]
    models = [name for name in models if HUB_ID.fullmatch(name)]
    sections = [
        f"---\n{_header(card, models, license)}\n---\n",
        f"# {_inline(name)}\n",
        _summary(steering, models),
        f"```python\nfrom trimtab import LM, from_pretrained\n\nlm = LM.load({_quoted(models)})\n"
        f'steering = from_pretrained("{name}")\n'
        f'for answer in lm.generate(["…"] * 2, [None, steering]):\n    print(answer.text)\n```\n',
        "## What it does\n",
        _table(("layer", "site", "operation", "at", "strength", "norm"), list(_edits(steering))),
    ]
    measured = [row for part in _cards(card) for row in _flat(part.measured)]
    if measured:
        sections += ["## What was measured\n", _table(("measure", "value"), measured[:MOST])]
    sections += _measured_effects(steering)
    sections += ["## Where it comes from\n", _table(("", ""), list(_origin(steering)))]
    sections.append(f"The steering is `{file}`; its digest covers its edits and its card.\n")
    return "\n".join(sections)


def baked_page(steering: Steering, name: str, model: str, notes: Sequence[str]) -> str:
    """The text of README.md of a model with a steering in its weights: what was done to which model.

    Args:
        steering: The steering in the weights.
        name: The name of the new model.
        model: The name of the model that it was made from.
        notes: Other remarks, one sentence each.
    """
    models = [model] if HUB_ID.fullmatch(model) else []
    sections = [
        f"---\n{_header(steering.card, models, None, 'transformers')}\n---\n",
        f"# {_inline(name)}\n",
        f"{_inline(model)} with a steering in its weights, made with trimtab. It loads like any other model, without"
        " hooks or other code; the license of the original model applies to it too.\n",
        "".join(f"- {_escaped(note)}\n" for note in notes),
        "## What was baked in\n",
        _table(("layer", "site", "operation", "at", "strength", "norm"), list(_edits(steering))),
        "## Where it comes from\n",
        _table(("", ""), list(_origin(steering))),
    ]
    return "\n".join(sections)


def _measured_effects(steering: Steering) -> list[str]:
    """The divergence and the audit, if the card has them; notes if they are of other edits."""
    card = steering.card
    sections = []
    if isinstance(card.divergence, Mapping):
        divergence_rows = [(f"divergence, {name}", _number(card.divergence.get(name))) for name in ("mean", "p95")]
        sections += ["## How much it changes the model\n", _table(("nats per token", ""), divergence_rows)]
        if not describes(card.divergence, steering):
            sections.append("This was measured with other strengths or layers than these.\n")
    audit = card.audit
    if isinstance(audit, Mapping) and isinstance(audit.get("verdict"), (list, tuple)):
        stale = "" if describes(audit, steering) else " It was run with other strengths or layers than these."
        about = (
            f"What `trimtab audit` found besides the intended effect ({_inline(str(audit.get('size')))} size).{stale}\n"
        )
        lines = [f"- {_escaped(' '.join(str(line).split()))}\n" for line in audit["verdict"]]
        sections += ["## Side effects\n", about, "".join(lines)]
    return sections


def _header(card: Card, models: Sequence[str], license: str | None, library: str = LIBRARY) -> str:
    from huggingface_hub import ModelCardData

    methods = dict.fromkeys(part.method for part in _cards(card))
    fields: dict[str, Any] = {"base_model": list(models) if len(models) > 1 else models[0]} if models else {}
    if license is not None:
        fields["license"] = license
    known = (method for method in methods if TAG.fullmatch(method) and method not in ("sum", "manual", "imported"))
    tags = [*TAGS, *known]
    return ModelCardData(library_name=library, pipeline_tag="text-generation", tags=tags, **fields).to_yaml()


def _cards(card: Card) -> Iterator[Card]:
    if not card.parts:
        yield card
    for part in card.parts:
        yield from _cards(part)


def _summary(steering: Steering, models: Sequence[str]) -> str:
    methods = " and ".join(dict.fromkeys(part.method for part in _cards(steering.card)))
    of = f" for {_inline(' and '.join(models or [model.name for model in steering.card.models]))}"
    what = f"A steering ({_inline(methods)}){of if steering.card.models or models else ''}, made with trimtab."
    instructions = [part.options["instruction"] for part in _cards(steering.card) if "instruction" in part.options]
    return f"{what}{f' It was learned from: *{_inline(str(instructions[0]))}*' if instructions else ''}\n"


def _edits(steering: Steering) -> Iterator[tuple[str, ...]]:
    for edit in steering.edits:
        operation = getattr(edit.operation, "operation", edit.operation)
        name = SCORE_NAMES[type(operation)] if isinstance(operation, ScoreOperation) else NAMES[type(operation)]
        norm = f"{operation.norm:.4g}" if isinstance(operation, Operation) else ""
        yield str(edit.site.layer), edit.site.kind, name, str(edit.positions), f"{edit.strength:g}", norm


def _origin(steering: Steering) -> Iterator[tuple[str, str]]:
    for card in _cards(steering.card):
        yield "method", card.method
        if card.model is not None:
            model = card.model
            revision = f", revision {model.revision}" if model.revision else ""
            yield "model", f"{model.name} ({model.family}, {model.layers} layers, width {model.width}{revision})"
            yield "fingerprint of its weights", model.fingerprint
            if model.adapters:
                yield "learned", model.adapted
        if card.data:
            yield "data", card.data
        yield from _flat(card.options)
        if card.versions:
            yield "versions", ", ".join(f"{name} {number}" for name, number in card.versions.items())
    yield "digest", steering_digest(steering)


def _flat(values: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """The numbers and texts of nested dicts, one row each; lists are counted unless they are short and plain."""
    for key, value in values.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping) and depth < DEEPEST:
            yield from _flat(value, f"{name}, ", depth + 1)
        elif isinstance(value, (list, tuple)):
            short = len(value) <= 12 and all(isinstance(item, (int, float, str)) for item in value)
            yield name, ", ".join(map(_number, value)) if short else f"{len(value)} items"
        else:
            yield name, _number(value)


def _number(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return str(value)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    lines += [f"| {' | '.join(map(_inline, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _inline(text: str) -> str:
    """Text as one line of Markdown, escaped so that nothing in it makes a table, a link or a tag."""
    short = " ".join(text.split())
    return _escaped(short if len(short) <= LONGEST else f"{short[: LONGEST - 1]}…")


def _escaped(text: str) -> str:
    for sign in "\\|`*_[]<>#":
        text = text.replace(sign, f"\\{sign}")
    return text


def _quoted(models: Sequence[str]) -> str:
    return f'"{models[0]}"' if models else ""
