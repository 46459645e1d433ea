"""A steering and its card in words and numbers, the same in a terminal and in a notebook."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trimtab.errors import UnsupportedError

if TYPE_CHECKING:
    from trimtab.report.pushes import Push
    from trimtab.steering import Card, Edit, Gate, Operation, Steering


def origin(card: Card) -> str:
    """The method and the model of a card, in a few words."""
    models = " and ".join(model.name for model in card.models)
    what = f"a sum of {len(card.parts)} steerings" if card.parts else card.method
    return f"{what} on {models}" if models else what


def card_rows(card: Card) -> list[tuple[str, str]]:
    """The contents of a card as names and values, without its parts, which are cards themselves."""
    rows = []
    if card.model is not None:
        model = card.model
        revision = f", revision {model.revision}" if model.revision else ""
        rows.append(("model", f"{model.name} ({model.family}, {model.layers} layers, width {model.width}{revision})"))
        rows.append(("fingerprint", model.fingerprint))
        if model.adapters:
            rows.append(("learned", model.adapted))
    if card.data:
        pairs = card.measured.get("pairs")
        rows.append(("data", f"{card.data}{f' ({pairs} pairs)' if pairs else ''}"))
    for name, value in card.options.items():
        rows.append((name.replace("_", " "), _value(value)))
    for name, value in card.measured.items():
        if name not in ("pairs", "agreement", "activation_norm") and (name, value) not in card.options.items():
            rows.append((name.replace("_", " "), IN_WORDS.get(name, _value)(value)))
    rows += measured_rows(card)
    if card.versions:
        rows.append(("versions", ", ".join(f"{name} {number}" for name, number in card.versions.items())))
    return rows


def measured_rows(card: Card) -> list[tuple[str, str]]:
    """The divergence and the audit on a card, with one row per line of the verdict.

    A card may hold anything, so what can't be read is left out.
    """
    rows = []
    divergence, audit = card.divergence, card.audit
    if (
        isinstance(divergence, Mapping)
        and isinstance(divergence.get("mean"), float)
        and isinstance(divergence.get("p95"), float)
    ):
        rows.append(("divergence", f"{divergence['mean']:.3g} nats per token, 95th percentile {divergence['p95']:.3g}"))
    elif isinstance(divergence, Mapping) and divergence.get("tokens"):
        rows.append(("divergence", "infinite: at some tokens the steered model's probabilities aren't finite"))
    if isinstance(audit, Mapping) and isinstance(audit.get("verdict"), (list, tuple)):
        size = audit.get("size")
        rows += [(f"audit ({size})" if n == 0 else "", str(line)) for n, line in enumerate(audit["verdict"])]
    return rows


def _tuning(value: Any) -> str:
    """A search in one sentence; `--json` shows its table."""
    try:
        held_out, candidate_count = value["held_out"], len(value["table"]) - 1
        if held_out is None:
            return f"chosen among {candidate_count} candidates, not confirmed on held-out prompts"
        low, high = held_out["difference"]["low"], held_out["difference"]["high"]
        return (
            f"chosen among {candidate_count} candidates; on {held_out['items']} held-out prompts"
            f" {held_out['steered']:.2f} instead of"
            f" {held_out['unsteered']:.2f}, difference [{low:+.2f}, {high:+.2f}]"
        )
    except (KeyError, TypeError, ValueError):  # a card may hold anything under that name
        return _value(value)


def _tries(value: Any) -> str:
    """How compliant answers were requested, and how many of them were kept."""
    try:
        each = [
            (f"{attempt['help']}: " if attempt["help"] else "", attempt["kept"], attempt["asked"]) for attempt in value
        ]
        return "; ".join(f"{label}{kept} of {count} kept" for label, kept, count in each)
    except (KeyError, TypeError):  # a card may hold anything under that name
        return _value(value)


IN_WORDS: Mapping[str, Callable[[Any], str]] = {"tuning": _tuning, "tries": _tries}
"""How to describe measurements that aren't shown as they are."""


def _value(value: Any) -> str:
    """A value of a card, shortened: consecutive integers as `0-29`, many numbers by layer as their range."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        first = value[0] if value else None
        if len(value) > 2 and isinstance(first, int) and list(value) == list(range(first, first + len(value))):
            return f"{first}-{value[-1]}"
        return ", ".join(map(_value, value))
    if isinstance(value, Mapping):
        numbers = [
            number for number in value.values() if isinstance(number, (int, float)) and not isinstance(number, bool)
        ]
        if len(numbers) == len(value) > 4:
            return f"{min(numbers):.3g} to {max(numbers):.3g} (of {len(numbers)})"
        return ", ".join(f"{name}: {_value(entry)}" for name, entry in value.items())
    return str(value)


def edit_columns(steering: Steering, edit_pushes: Sequence[Push]) -> tuple[str, dict[str, list[str]]]:
    """The shared properties of all edits as one line, and the columns in which they differ, with one cell per edit."""
    columns: dict[str, list[str]] = {
        "operation": [_operation(edit.operation) for edit in steering.edits],
        "at": [str(edit.positions) for edit in steering.edits],
        "when": [describe_gate(edit.gate) for edit in steering.edits],
        "strength": [f"{edit.strength:g}" for edit in steering.edits],
        "share": ["" if push.share is None else f"{push.share:.0%}" for push in edit_pushes],
        "agreement": ["" if push.agreement is None else f"{push.agreement:.2f}" for push in edit_pushes],
    }
    common = {name: columns.pop(name)[0] for name in ("operation", "at", "when", "strength") if _same(columns[name])}
    if common.get("when") == "always":
        del common["when"]
    count = "1 edit" if len(edit_pushes) == 1 else f"{len(edit_pushes)} edits"
    line = f"{count}: {', '.join(f'{name} {value}' for name, value in common.items())}".rstrip(": ")
    return line, {name: cells for name, cells in columns.items() if any(cells)}


def edit_rows(steering: Steering) -> list[dict[str, Any]]:
    """The edits in order, one mapping per edit; numbers that aren't known are `nan`."""
    return [{**_edit_facts(edit), **_push_facts(replace(steering, edits=(edit,)))} for edit in steering.edits]


def _edit_facts(edit: Edit) -> dict[str, Any]:
    from trimtab.steering.attention import SCORE_NAMES
    from trimtab.steering.operations import NAMES

    operation = getattr(edit.operation, "operation", edit.operation)  # unwrap a Conditional
    return {
        "layer": edit.site.layer,
        "site": str(edit.site),
        "operation": (NAMES | SCORE_NAMES)[type(operation)],
        "positions": str(edit.positions),
        "gate": describe_gate(edit.gate),
        "strength": edit.strength,
    }


def _push_facts(steering: Steering) -> dict[str, float]:
    """The push of a steering with one edit; `nan` if it steers attention, which has no direction."""
    from trimtab.report.pushes import pushes

    try:
        (push,) = pushes(steering)
    except UnsupportedError:
        return dict.fromkeys(("norm", "share", "agreement"), math.nan)
    facts = {"norm": push.norm, "share": push.share, "agreement": push.agreement}
    return {name: math.nan if value is None else value for name, value in facts.items()}


def _same(values: Sequence[str]) -> bool:
    return len(set(values)) == 1


def _operation(operation: Operation) -> str:
    from trimtab.steering.operations import NAMES

    return NAMES[type(operation)] + _norm_note(operation.keep_norm)


def _norm_note(share: float) -> str:
    return "" if not share else " (norm kept)" if share == 1 else f" ({share:g} of the norm kept)"


def describe_gate(gate: Gate) -> str:
    """A gate in words, such as `dot at residual[3] > 0.5`."""
    from trimtab.steering.gates import AllOf, Always, AnyOf, Not, Threshold

    match gate:
        case Always():
            return "always"
        case Threshold():
            return str(gate)
        case Not():
            return f"not ({describe_gate(gate.gate)})"
        case AllOf() | AnyOf():
            word = " and " if isinstance(gate, AllOf) else " or "
            return f"({word.join(map(describe_gate, gate.gates))})"
    return type(gate).__name__
