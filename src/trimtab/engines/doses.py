"""A warning for doses at which the text is likely to break."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from trimtab.engines.answer import Generation
from trimtab.keywords import caller_stacklevel
from trimtab.steering import Steering

DOSE_WARNING = 0.3
"""Above this overall dose (`Applied.overall`), text steered along an activation difference is likely to break."""

TRAINED_DOSE_WARNING = 2.0
"""The same for steerings that were trained on the model's own text, which stays intact at much higher doses."""


class DoseWarning(UserWarning):
    """The dose exceeds `DOSE_WARNING`, or for a trained steering `TRAINED_DOSE_WARNING`."""

    once = True  # the command line shows only the first: from batch to batch just the numbers differ


def warn_of_doses(answers: Sequence[Generation], steerings: Sequence[Steering | None]) -> None:
    """Warn the caller of `generate` about the answer whose dose exceeds its steering's limit by the largest factor.

    Args:
        answers: All answers, in the requests' order, equally many per request.
        steerings: The steering of each request. A sum counts as trained if all of its parts do.
    """
    each = len(answers) // len(steerings) if steerings else 0
    worst, most, limit = None, 1.0, DOSE_WARNING
    for i, answer in enumerate(answers):
        steering = steerings[i // each]
        allowed = TRAINED_DOSE_WARNING if steering is not None and steering.card.trained else DOSE_WARNING
        if (over := answer.applied.overall / allowed) > most:
            worst, most, limit = answer, over, allowed
    if worst is None:
        return
    doses = worst.applied.doses
    hardest = max(doses, key=lambda dose: dose.ratio)
    message = f"at layer {hardest.layer} the edit is {hardest.ratio:.2g} times as long as the activation"
    if len(doses) > 1:
        message += f", and over {len(doses)} layers {worst.applied.overall:.2g} times"
    warnings.warn(
        f"{message}; above {limit:g} text tends to break. Lower the strength"
        f"{' or steer at fewer layers' if len(doses) > 1 else ''}",
        DoseWarning,
        stacklevel=caller_stacklevel(),
    )
