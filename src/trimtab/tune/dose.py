"""Finds the strength for a given dose: the norm of a steering's edits relative to the activations, over layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from trimtab.engines.doses import DoseWarning
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Ablate, Add, MaskNeurons, ReadWrite, ScaleElements, SetProjection, Steering
from trimtab.steering.attention import SCORE_NAMES, ScoreOperation
from trimtab.steering.operations import NAMES
from trimtab.steering.rotations import Rotate, RotateInPlane, RotatePredicted
from trimtab.steering.scaled import AddScaled
from trimtab.text.chat import Prompt

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM

ADDING = (Add, AddScaled, SetProjection, Ablate, ScaleElements, MaskNeurons, ReadWrite)
GROWING = (*ADDING, Rotate, RotateInPlane, RotatePredicted)
"""Operations whose edit is zero at strength 0 and grows with it (rotations only up to half a turn)."""

CLOSE = 0.02
"""Tolerance: a dose this close to the requested one, as a share of it, is accepted."""

TRIES = 12
TOKENS = 8
"""A dose is measured over the prompt and this many generated tokens."""


@dataclass(frozen=True)
class Dosed:
    """`steering` is `factor` times the steering passed in, and has this `dose` on the prompts it was measured on."""

    steering: Steering
    factor: float
    dose: float


def at_dose(
    lm: LM,
    steering: Steering,
    dose: float,
    prompts: Prompt | Sequence[Prompt],
    *,
    tokens: int = TOKENS,
    **options: Any,
) -> Dosed:
    """Scale a steering to a given dose: `Applied.overall`, averaged over the prompts that it acts on.

    The dose is measured at the positions where the steering acts, in the prompts and in the first `tokens` tokens of
    its own answers. The strength is found by trial. Additions need few tries, since their dose is proportional to the
    strength, except for what an edit changes in later layers.

    Args:
        lm: An engine that measures doses.
        steering: Its edits keep their relative strengths, and their signs.
        dose: The root of the summed squares of `‖edit‖ / ‖activation‖` over layers; 0.2 is mild.
        prompts: The prompts that the dose is measured on.
        tokens: The number of generated tokens that count.
        options: For `lm.generate`: `system`, `chat`, `transfer`, `batch_size`.

    Raises:
        TrimtabError: The dose isn't a positive number, nothing acts on these prompts, or no strength has that dose.
        UnsupportedError: An operation whose dose doesn't follow from its strength; the message names it.
    """
    if isinstance(dose, bool) or not isinstance(dose, (int, float)) or not (math.isfinite(dose) and dose > 0):
        raise TrimtabError(f"a dose is a number above 0, such as 0.2, got {dose!r}")
    check_growing(steering)
    factor, below, above = 1.0, (0.0, 0.0), None
    for _ in range(TRIES):
        measured = _measured(lm, factor * steering, prompts, tokens, options)
        if measured is None:
            raise TrimtabError(
                "nothing is steered on these prompts (strength 0, a shut gate, or positions that they don't have), so"
                " no strength has a dose there"
            )
        if abs(measured - dose) <= CLOSE * dose:
            return Dosed(factor * steering, factor, measured)
        if measured < dose:
            below = (factor, measured)
        else:
            above = (factor, measured)
        factor = _next(below, above, dose)
    nearest = min((bound for bound in (below, above) if bound is not None), key=lambda bound: abs(bound[1] - dose))
    raise TrimtabError(
        f"no strength was found at which the dose is {dose:g}: at {nearest[0]:.3g} times the steering it is"
        f" {nearest[1]:.3g}; ask for a dose near that, or give a strength"
    )


def check_growing(steering: Steering) -> None:
    """Raises `UnsupportedError` for an edit whose dose doesn't grow with its strength, and names it."""
    for edit in steering.edits:
        operation = getattr(edit.operation, "operation", edit.operation)  # for a conditional one, the operation inside
        if isinstance(operation, ScoreOperation):
            raise UnsupportedError(
                f"{SCORE_NAMES[type(operation)]} steers attention scores, which have no dose; give a strength"
            )
        if edit.site.kind in ("router", "keys"):
            what = "a router's logits" if edit.site.kind == "router" else "the keys of attention"
            raise UnsupportedError(f"{edit} moves {what}, which have no dose; give a strength")
        if not isinstance(operation, GROWING):
            name = NAMES.get(type(operation), type(operation).__name__)
            raise UnsupportedError(f"the dose of {name} doesn't follow from its strength; give a strength, not a dose")


def _next(below: tuple[float, float], above: tuple[float, float] | None, dose: float) -> float:
    """The factor to try next: by linear interpolation between two measurements, but well inside the interval."""
    if above is None:
        ratio = dose / below[1] if below[1] > 0 and math.isfinite(below[1]) else math.inf
        return below[0] * min(4.0, ratio) if below[0] else 1.0
    if not math.isfinite(above[1]):
        return (below[0] + above[0]) / 2
    share = (dose - below[1]) / (above[1] - below[1])
    return below[0] + (above[0] - below[0]) * min(0.95, max(0.05, share))


def _measured(
    lm: LM, steering: Steering, prompts: Prompt | Sequence[Prompt], tokens: int, options: dict[str, Any]
) -> float | None:
    """The mean dose over the prompts that are steered; `None` if none is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoseWarning)
        answers = lm.generate(prompts, steering, max_new_tokens=tokens, **options)
    doses = [answer.applied.overall for answer in answers if answer.applied.doses]
    if not doses:
        return None
    return math.inf if any(math.isnan(dose) for dose in doses) else mean(doses)
