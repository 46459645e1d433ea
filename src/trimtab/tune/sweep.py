"""One steering at every layer and strength, in a table: the share that passes a check, the dose, and the fluency.

A sweep is for an overview, not for a careful choice. `trimtab.tune.tune` halves the candidates and confirms the best
one on held-out prompts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import index
from statistics import mean
from typing import TYPE_CHECKING, Any

from trimtab.data import queries
from trimtab.engines.arguments import as_list
from trimtab.errors import TrimtabError
from trimtab.evaluate.fluency import Fluency, fluencies
from trimtab.lm import DoseWarning
from trimtab.steering import Steering
from trimtab.steering.steering import check_strength
from trimtab.text.chat import Prompt, Template
from trimtab.tune.candidates import STRENGTHS
from trimtab.tune.guard import STANDARD, Guard, median_perplexity

if TYPE_CHECKING:
    from trimtab.engines.answer import Generation
    from trimtab.engines.language_model import LanguageModel as LM

PROMPTS = 8
"""The number of the package's queries that are used if no prompts are passed."""

Check = Callable[[str], "bool | float"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SweepRow:
    """One layer and strength, over all prompts.

    `layer` is `None` for the unsteered answers. `passed` is the share of answers that pass the check (or the mean
    score), `None` without one; `dose` the mean of `‖edit‖ / ‖activation‖`; `repeated` the mean share of four-grams that
    occurred before; `perplexity` the median under the unsteered model, `None` if all answers are empty; `broken` names
    the guard's limits that the answers exceed. `steering` is the one that was used, and `answers` are in the order of
    the prompts.
    """

    layer: int | None
    strength: float
    passed: float | None
    dose: float
    repeated: float
    perplexity: float | None
    broken: tuple[str, ...] = ()
    steering: Steering | None = field(default=None, repr=False, compare=False)
    answers: tuple[Generation, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Sweep:
    """A row for each layer and strength, and one for the unsteered model.

    In a notebook it is displayed as a table. `best()` is the best row, `to_pandas()` a data frame, `plot()` a plot.
    """

    rows: tuple[SweepRow, ...]
    unsteered: SweepRow
    prompts: tuple[Prompt, ...] = field(repr=False)

    def best(self) -> SweepRow:
        """The row that passes most often among those that exceed none of the guard's limits.

        Ties go to the smaller dose, then to the lower layer.

        Raises:
            TrimtabError: There was no check, or no such row passes more often than the unsteered answers.
        """
        if self.unsteered.passed is None:
            raise TrimtabError(
                "the best row is decided by a check: pass check= to the sweep, "
                "a function of an answer's text such as str.isupper"
            )
        whole = [row for row in self.rows if not row.broken]
        better = [row for row in whole if _score(row) > self.unsteered.passed]
        if not better:
            broken = len(self.rows) - len(whole)
            raise TrimtabError(
                f"nothing is better than not steering, which passes {self.unsteered.passed:.2f}:"
                f" of {len(self.rows)} settings {broken} break the guard and {len(whole)} pass no more often"
            )
        return min(better, key=lambda row: (-_score(row), row.dose, row.layer))

    def to_pandas(self) -> Any:
        """A data frame with one line per row, the unsteered one first (its layer is missing).

        Raises `TrimtabError` if pandas isn't installed.
        """
        names = ("layer", "strength", "passed", "dose", "repeated", "perplexity", "broken")
        rows = [{name: getattr(row, name) for name in names} for row in (self.unsteered, *self.rows)]
        for row in rows:
            row["broken"] = "; ".join(row["broken"])
        from trimtab.report.frames import frame

        return frame(rows).astype({"layer": "Int64"})

    def plot(self, ax: Any = None) -> Any:
        """Plot the share that passes (without a check, the perplexity) against strength, one line per layer.

        With a single strength, the x-axis is the layer. Rows that exceed the guard's limits are marked with a cross.
        Draws into matplotlib's `ax`, or a new one, and returns it. Raises `TrimtabError` if matplotlib isn't installed.
        """
        from trimtab.report.axes import draw_sweep_lines

        return draw_sweep_lines(self, ax)

    def _repr_html_(self) -> str:
        from trimtab.report.notebook import sweep_html

        return str(sweep_html(self))


def sweep(
    lm: LM,
    steering: Steering,
    *,
    layers: int | Iterable[int] | None = None,
    strengths: float | Iterable[float] = STRENGTHS,
    prompts: Prompt | Sequence[Prompt] | None = None,
    check: Check | None = None,
    max_new_tokens: int = 48,
    batch_size: int = 64,
    system: str | None = None,
    chat: bool | None = None,
    template: Template | None = None,
    guard: Guard | None = STANDARD,
    transfer: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Sweep:
    """Implements `lm.sweep`; see its documentation."""
    candidates = _candidates(steering, layers, strengths)
    prompt_list = list(queries("tune")[:PROMPTS]) if prompts is None else as_list(prompts)
    if check is not None and not callable(check):
        raise TrimtabError(f"check is a function of an answer's text, got {check!r}")
    if options.get("num_return_sequences") not in (None, 1):
        raise TrimtabError(
            "a sweep has one answer for each prompt; leave num_return_sequences out, and give more prompts"
        )
    steerings = [None, *(each_steering for _, _, each_steering in candidates)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoseWarning)  # trying strengths that are too strong is the point of a sweep
        answers = lm.generate(
            prompt_list * len(steerings),
            [each_steering for each_steering in steerings for _ in prompt_list],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            system=system,
            chat=chat,
            template=template,
            transfer=transfer,
            progress=progress,
            **options,
        )
    fluency_list = fluencies(lm, prompt_list * len(steerings), answers, system=system, chat=chat, template=template)
    parts = [slice(n * len(prompt_list), (n + 1) * len(prompt_list)) for n in range(len(steerings))]
    unsteered_fluency = fluency_list[parts[0]]
    rows = []
    for (layer, strength, scaled), part in zip([(None, 0.0, None), *candidates], parts, strict=True):
        broken = guard.broken(fluency_list[part], unsteered_fluency) if guard is not None and scaled is not None else ()
        rows.append(_row(layer, strength, scaled, answers[part], fluency_list[part], check, broken))
    return Sweep(tuple(rows[1:]), rows[0], tuple(prompt_list))


def _candidates(
    steering: Steering, layers: int | Iterable[int] | None, strengths: float | Iterable[float]
) -> list[tuple[int | None, float, Steering | None]]:
    if not isinstance(steering, Steering):
        raise TrimtabError(f"a sweep needs a steering, got {type(steering).__name__}")
    if not steering.edits:
        raise TrimtabError("this steering has no edits, so there is nothing to try")
    wanted = steering.layers if layers is None else layers if isinstance(layers, Iterable) else [layers]
    try:
        listed = [index(layer) for layer in wanted]
    except TypeError:
        raise TrimtabError(f"layers are a whole number, or a list of them such as [12, 14], got {layers!r}") from None
    multiples = [strengths] if isinstance(strengths, (int, float)) else list(strengths)
    if not listed or not multiples:
        raise TrimtabError(f"there is no {'strength' if listed else 'layer'} to try")
    if any(check_strength(multiple) == 0 for multiple in multiples):
        raise TrimtabError("strength 0 doesn't steer, and a sweep always has an unsteered row; leave it out")
    return [
        (layer, float(strength), strength * steering[layer])
        for layer in dict.fromkeys(listed)
        for strength in dict.fromkeys(multiples)
    ]


def _row(
    layer: int | None,
    strength: float,
    steering: Steering | None,
    answers: Sequence[Generation],
    fluency_list: Sequence[Fluency],
    check: Check | None,
    broken: tuple[str, ...],
) -> SweepRow:
    return SweepRow(
        layer=layer,
        strength=strength,
        passed=None if check is None else mean(_check_score(check, answer.text) for answer in answers),
        dose=mean(answer.applied.dose_if_measured for answer in answers),
        repeated=mean(fluency.repeated for fluency in fluency_list),
        perplexity=median_perplexity(fluency_list),
        broken=broken,
        steering=steering,
        answers=tuple(answers),
    )


def _check_score(check: Check, text: str) -> float:
    said: Any = check(text)
    try:
        score = float(said)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise TrimtabError(f"a check must return a boolean or a number, but this one returned {said!r} for {text!r}")
    return score


def _score(row: SweepRow) -> float:
    assert row.passed is not None
    return row.passed
