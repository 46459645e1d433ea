"""A warning where a steering pushed so hard that the text is likely to fall apart."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from trimtab.engines.answer import Generation

DOSE_WARNING = 1.0
"""Above this mean `‖edit‖ / ‖activation‖` at a layer, the text is likely to fall apart."""


class DoseWarning(UserWarning):
    """A steering pushed harder than `DOSE_WARNING`."""


def warn_of_doses(answers: Sequence[Generation]) -> None:
    """Warn, for the caller of `generate`, of the largest dose of all answers where it is too large."""
    worst = max((dose for answer in answers for dose in answer.applied.doses), key=lambda d: d.ratio, default=None)
    if worst is not None and worst.ratio > DOSE_WARNING:
        warnings.warn(
            f"at layer {worst.layer} the edit is {worst.ratio:.2g} times as long as the activation; above"
            f" {DOSE_WARNING:g} text tends to fall apart. Lower the strength",
            DoseWarning,
            stacklevel=3,
        )
