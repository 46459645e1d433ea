"""Which methods can learn a task, and from what data, as declared by their recipes; if one can't, the reason."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.bench.tasks import Task, TrainingData
from trimtab.engines.transformers.prefix_cache import use_prefix_cache
from trimtab.errors import TrimtabError
from trimtab.evaluate.controls import means_for
from trimtab.methods.recipe import Recipe

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.steering import Steering

UNDIRECTED = {"tda": "it switches neurons off to save compute, and isn't directed at any behaviour"}
"""Methods whose steering isn't directed at a behaviour."""
CONTROL = "random"
"""The method that serves as the control for all others."""
CONDITIONS = {"when", "unless", "harmless"}
"""Options that take texts on which to act, or not to act."""
HEADS = 48


@dataclass(frozen=True)
class Inputs:
    """The arguments of a method: its data, and keywords."""

    data: tuple[Any, ...]
    options: dict[str, Any]


def inputs_for(recipe: Recipe, lessons: TrainingData, seed: int) -> Inputs | str:
    """The method's inputs for this task; or the reason, in words, why it can't learn it."""
    if recipe.name in UNDIRECTED:
        return UNDIRECTED[recipe.name]
    named = {option.name: option for option in recipe.options}
    options: dict[str, Any] = {}
    if "seed" in named:
        options["seed"] = seed
    conditions = CONDITIONS & {name for name, option in named.items() if option.kind == "texts"}
    if conditions and not (lessons.texts and lessons.others):
        return "it acts on some prompts and not on others, and here all prompts are of one kind"
    for name in conditions:
        options[name] = list(lessons.texts if name == "when" else lessons.others)
    if recipe.name == "distill":
        if not lessons.teacher:
            return "it learns from a prompt, and this task has none"
        return Inputs((), {**options, **lessons.teacher, "seed": seed})
    if recipe.takes == "nothing":
        texts = [name for name in ("positive", "negative") if name in named]
        if texts and lessons.contrast is None:
            return "it learns from two texts, and this task has none"
        if texts and lessons.contrast is not None:
            options |= dict(zip(("positive", "negative"), lessons.contrast, strict=True))
        return Inputs((), options)
    if recipe.takes == "texts":
        if not lessons.texts:
            return "it learns from prompts of two kinds, and here all prompts are of one kind"
        return Inputs((list(lessons.texts),), options)
    shape = next((shape for shape in recipe.shapes if lessons.pairs.get(shape)), None)
    if shape is None:
        has = ", ".join(shape for shape, pairs in lessons.pairs.items() if pairs)
        return f"it learns from pairs of {' or '.join(recipe.shapes)}, and this task has pairs of {has}"
    return Inputs((list(lessons.pairs[shape]),), options)


def learn_steering(lm: LM, recipe: Recipe, inputs: Inputs) -> Steering:
    """The method's steering, with its own defaults except for these arguments.

    Raises what the method raises, and `KeyboardInterrupt` if learning was interrupted and returned early.
    """
    options = dict(inputs.options)
    if recipe.name == "iti":
        from trimtab.engines.contract import query_heads

        options["heads"] = min(HEADS, lm.layout.layers * query_heads(lm.layout))
    # a method of somebody else's may change weights for a while
    with use_prefix_cache(None), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # with few pairs, warnings are expected
        steering: Steering = recipe.load()(lm, *inputs.data, None, **options)
    if steering.card.measured.get("interrupted"):
        # an interrupted optimization returns the best so far, but a run stores only complete cells
        raise KeyboardInterrupt
    if not steering.edits:
        raise TrimtabError("it learned a steering without edits")
    return steering


def orthogonal(lm: LM, steering: Steering, task: Task, seed: int) -> Steering:
    """A control: vectors of the same norms, orthogonal to the steering's own. Raises `TrimtabError` if it has none."""
    from trimtab.evaluate.controls import orthogonal_like

    return orthogonal_like(steering, seed, means_for(lm, [steering], task.reference_prompts))
