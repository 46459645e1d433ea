"""The methods that learn from pairs, as the command line offers them. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from trimtab.errors import TrimtabError
from trimtab.text.pairs import Pair

if TYPE_CHECKING:
    from trimtab.steering import Steering


@dataclass(frozen=True)
class Recipe:
    """A method: its paper, the shapes of pairs it learns from, where it reads and acts, and its function."""

    title: str
    paper: str
    shapes: tuple[str, ...]
    data: str
    reads: str
    acts: str
    function: str  # module:name

    def load(self) -> Callable[..., Steering]:
        """The function that learns. Imports torch."""
        module, name = self.function.split(":")
        function: Callable[..., Steering] = getattr(import_module(module), name)
        return function


RECIPES = {
    "caa": Recipe(
        title="contrastive activation addition",
        paper="Rimsky et al., ACL 2024, arXiv 2312.06681",
        shapes=("letters", "answers", "texts"),
        data="question + answer_matching_behavior + answer_not_matching_behavior; or positive + negative (+ prompt)",
        reads="the answer's letter, or the last token of a text",
        acts="adds at one block (default: 0.4 of the depth), from the last prompt token on",
        function="trimtab.methods.caa:learn_caa",
    ),
    "instruct": Recipe(
        title="instruction vectors",
        paper="Stolfo et al., ICLR 2025, arXiv 2410.12877",
        shapes=("prompts", "texts"),
        data="prompt + prompt_without_instruction; or positive + negative, both prompts",
        reads="the last prompt token",
        acts="moves the projection at one block (default: 0.6 of the depth) to where the instruction puts it, at every"
        " token but the first; or adds",
        function="trimtab.methods.instruct:learn_instruct",
    ),
}


def recipe_for(name: str, pairs: Sequence[Pair], source: str) -> Recipe:
    """The method of that name. Raises `TrimtabError` when there is none or it can't learn from such pairs, if any."""
    if name not in RECIPES:
        raise TrimtabError(f"there is no method {name!r}; methods: {', '.join(RECIPES)}")
    shape = pairs[0].shape if pairs else RECIPES[name].shapes[0]
    if shape not in RECIPES[name].shapes:
        able = [other for other, recipe in RECIPES.items() if shape in recipe.shapes]
        raise TrimtabError(
            f"{source} holds pairs of {shape}, and {name} learns from {RECIPES[name].data};"
            f" the method for these is {' or '.join(able)}"
        )
    return RECIPES[name]
