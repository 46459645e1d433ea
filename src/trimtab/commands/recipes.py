"""The method that learns from the pairs at hand. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.errors import TrimtabError
from trimtab.methods.recipe import Recipe, recipe_named, recipes
from trimtab.text.pairs import Pair


def recipe_for(name: str, pairs: Sequence[Pair], source: str) -> Recipe:
    """The method of that name. Raises `TrimtabError` when there is none or it can't learn from such pairs, if any."""
    recipe = recipe_named(name)
    if recipe is None:
        raise TrimtabError(f"there is no method {name!r}; methods: {', '.join(recipes())}")
    check_shape(recipe, pairs, source)
    return recipe


def check_shape(recipe: Recipe, pairs: Sequence[Pair], source: str) -> None:
    """Raises `TrimtabError`, naming the methods that can, when the method can't learn from pairs of this shape."""
    if not pairs or pairs[0].shape in recipe.shapes:
        return
    shape = pairs[0].shape
    able = [other for other, each in recipes().items() if shape in each.shapes]
    raise TrimtabError(
        f"{source} holds pairs of {shape}, and {recipe.name} learns from {recipe.data};"
        f" the method for these is {' or '.join(able)}"
    )
