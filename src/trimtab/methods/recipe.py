"""Recipes: the descriptions of methods, from which their commands and help are generated.

trimtab's own are listed in `own.py`. A method of another distribution is found by its entry point, which refers to a
`Recipe`:

    [project.entry-points."trimtab.methods"]
    median = "trimtab_median:RECIPE"
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.plugins import METHODS, Plugin, find_plugin, find_plugins, load_plugins

KINDS = ("str", "int", "float", "bool", "pairs", "texts", "positions", "steering")
TAKES = ("pairs", "texts", "nothing")


@dataclass(frozen=True)
class Option:
    """An option of a method: a keyword of its function, and an option of its command.

    `kind` is one of `KINDS`: a number, a text, a flag, positions, or a file of pairs, of texts or of a steering, which
    is read before the function is called. `default` is shown in the help and passed to the function if the option is
    missing; `None` means the function's own default.
    """

    name: str
    kind: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TrimtabError(f"option {self.name}: unknown kind {self.kind!r}; known: {', '.join(KINDS)}")


@dataclass(frozen=True)
class Recipe:
    """A method: its paper, its training data, where it reads and acts, its cost, its function and options.

    `takes` is the function's second argument: `"pairs"` of texts (of one of `shapes`), `"texts"`, or `"nothing"`.
    `function` is a reference, `"module:function"`, so that help doesn't need to import it. `distribution` is set when
    the recipe is found.
    """

    name: str
    title: str
    paper: str
    data: str
    reads: str
    acts: str
    function: str
    sites: str = "residual"
    cost: str = "one addition per layer and token"
    takes: str = "pairs"
    shapes: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    distribution: str = "trimtab"

    def __post_init__(self) -> None:
        if self.takes not in TAKES:
            raise TrimtabError(f"{self.name}: takes is one of {', '.join(TAKES)}, got {self.takes!r}")
        if (self.takes == "pairs") != bool(self.shapes):
            raise TrimtabError(f"{self.name}: a method that takes pairs names their shapes, and no other method does")
        if not all(self.function.partition(":")):
            raise TrimtabError(f"{self.name}: function is 'module:function', got {self.function!r}")

    def load(self) -> Callable[..., Any]:
        """Import and return the function that learns, which imports torch.

        Raises:
            TrimtabError: A function of another distribution can't be imported.
        """
        try:
            function: Callable[..., Any] = EntryPoint(self.name, self.function, METHODS).load()
        except Exception as error:
            if self.distribution == "trimtab":
                raise
            raise TrimtabError(
                f"the method {self.name!r} of {self.distribution} can't be loaded: {self.function}:"
                f" {type(error).__name__}: {error}"
            ) from error
        return function


def own_recipes() -> dict[str, Recipe]:
    """The recipes of trimtab's own methods by name."""
    from trimtab.methods.own import OWN

    return {recipe.name: recipe for recipe in OWN}


def find_recipe(name: str) -> Recipe | None:
    """The recipe of that name, of trimtab or another distribution; `None` if there is none. Imports no other recipe.

    Raises:
        TrimtabError: Two methods have that name, or the recipe can't be loaded.
    """
    own = own_recipes()
    installed = find_plugin(METHODS, name, own)
    return own.get(name) if installed is None else _recipe_of(installed)


def recipes() -> dict[str, Recipe]:
    """All recipes by name: trimtab's own, then those of other distributions, each in the order of their names.

    A recipe that can't be loaded is left out, with a `PluginWarning` that names its distribution.

    Raises:
        TrimtabError: Two methods have the same name.
    """
    own = own_recipes()
    return own | load_plugins(find_plugins(METHODS, own), _recipe_of)


def _recipe_of(entry: Plugin) -> Recipe:
    recipe = entry.load()
    if not isinstance(recipe, Recipe):
        raise entry.load_error(f"it isn't a Recipe(…), but a {type(recipe).__name__}")
    if recipe.name != entry.name:
        raise entry.load_error(f"its recipe is called {recipe.name!r}, and its entry point {entry.name!r}")
    return replace(recipe, distribution=entry.distribution)
