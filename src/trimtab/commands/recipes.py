"""Find a method that can learn from given pairs. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from trimtab.errors import TrimtabError
from trimtab.methods.recipe import Recipe, find_recipe, recipes
from trimtab.text.pairs import Pair


def recipe_for(name: str, pairs: Sequence[Pair], source: str) -> Recipe:
    """The method of that name. Raises `TrimtabError` if there is none, or if it can't learn from such pairs."""
    recipe = require_recipe(name)
    check_shape(recipe, pairs, source)
    return recipe


def require_recipe(name: str) -> Recipe:
    """The method of that name. If there is none, raises `TrimtabError` with the most similar name."""
    recipe = find_recipe(name)
    if recipe is None:
        methods = recipes()
        near = get_close_matches(name.lower(), methods, n=1)
        hint = f"did you mean {near[0]!r}? Methods" if near else "methods"
        raise TrimtabError(f"there is no method {name!r}; {hint}: {', '.join(methods)}")
    return recipe


def check_shape(recipe: Recipe, pairs: Sequence[Pair], source: str) -> None:
    """Raise `TrimtabError` if the method can't learn from pairs of this shape, and name the methods that can."""
    if not pairs or pairs[0].shape in recipe.shapes:
        return
    shape = pairs[0].shape
    able = [other for other, each in recipes().items() if shape in each.shapes]
    raise TrimtabError(
        f"{source} holds pairs of {shape}, and {recipe.name} learns from {recipe.data};"
        f" the method for these is {' or '.join(able)}"
    )
