"""The suggested strength of a steering, from the activation norms on its card."""

from __future__ import annotations

import math
from pathlib import Path
from shlex import quote

from trimtab.report.pushes import pushes
from trimtab.steering import Add, Steering

MILD = 0.2
"""An overall dose at which text steered along a learned difference stays intact (benchmarks/RESULTS.md, `doses`)."""


NEAR = 0.1
"""A strength this close to 1 is rounded to 1: the dose is a rule of thumb, and `FILE:0.98` would only look precise."""
IN_NATS = "word-logit"
"""The method whose strength 1 is a push in nats, chosen by measuring; only one of its edits acts at a time."""

FOUND = frozenset({"tuning", "holds"})
"""What `tune` and `make` add to a card's measurements, each at the strength that it chose."""


def suggested_strength(steering: Steering) -> float | None:
    """The strength that is suggested for a steering.

    A steering that was trained, or found by `tune` or `make`, includes its strength, so this is 1. For additions of
    learned differences, it is the strength at which the overall dose is about `MILD`, given the activation norms on the
    card. Activations may be longer or shorter where the steering is used, so measure the dose with
    `trimtab.tune.at_dose`.

    Args:
        steering: The steering as loaded from its file.

    Returns:
        The strength with two digits, or `None` if it is unknown: for other operations than additions a strength means
        something else (1 is all of the way), and sums and files of other programs have no activation norms.
    """
    if has_its_strength(steering):
        return 1.0
    if not steering.edits or not all(isinstance(edit.operation, Add) for edit in steering.edits):
        return None
    shares = [push.share for push in pushes(steering)]
    if not all(share is not None and 0 < share < math.inf for share in shares):
        return None
    strength = MILD / math.sqrt(sum(share * share for share in shares if share is not None))
    return 1.0 if abs(strength - 1) <= NEAR else float(f"{strength:.2g}")


def has_its_strength(steering: Steering) -> bool:
    """Whether the strength was found together with the steering: by training, `tune`, `make`, or as a push in nats."""
    card = steering.card
    return card.trained or card.method == IN_NATS or not FOUND.isdisjoint(card.measured)


def named_with_strength(path: Path, steering: Steering) -> str:
    """The file as a command-line argument: `FILE:STRENGTH`, or `FILE` if the suggested strength is 1 or unknown."""
    suggested = suggested_strength(steering)
    return quote(str(path) if suggested in (None, 1.0) else f"{path}:{suggested:g}")
