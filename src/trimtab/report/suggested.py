"""The strength to begin with, from what a steering's card says of the activations that it was learned from."""

from __future__ import annotations

import math
from pathlib import Path
from shlex import quote

from trimtab.report.pushes import pushes
from trimtab.steering import Add, Steering

MILD = 0.2
"""An overall dose at which text steered along a learned difference stays whole (benchmarks/RESULTS.md, `doses`)."""


NEAR = 0.1
"""A strength this near to 1 is called 1: the dose is a rule of thumb, and `FILE:0.98` only looks precise."""
IN_NATS = "word-logit"
"""The method whose strength 1 is a push in nats, chosen by measuring; its edits act one at a time."""


def suggested_strength(steering: Steering) -> float | None:
    """What to multiply a steering by, to begin with.

    What was trained, or found by `tune`, has its strength: 1. Of what adds learned differences, it is the strength at
    which the overall dose is about `MILD`, by the card's norms of the activations it was learned from; where it
    is used they may be longer or shorter, so measure it with `trimtab.tune.at_dose`.

    Args:
        steering: As its file has it.

    Returns:
        The strength in two digits, or `None` where nothing is known: other operations than additions have strengths
        of their own (1 is all of the way), and sums and other programs' files say nothing of activations.
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
    """Whether its strength was found with it: by training, by `tune`, or by choosing a push in nats."""
    card = steering.card
    return card.trained or card.method == IN_NATS or "tuning" in card.measured


def named_with_strength(path: Path, steering: Steering) -> str:
    """The file as it is typed to steer with it: `FILE:STRENGTH`, or `FILE` where 1 is suggested, or nothing."""
    suggested = suggested_strength(steering)
    return quote(str(path) if suggested in (None, 1.0) else f"{path}:{suggested:g}")
