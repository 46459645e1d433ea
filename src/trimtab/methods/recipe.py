"""What a method says of itself: a literal in its own file, which is read without importing the file.

Every module of `trimtab.methods` may have one module-level `RECIPE = Recipe(…)`. It is evaluated from the source, so
that listing methods and showing their help wait for no torch; therefore it holds literals only, `Recipe(…)` and
`Option(…)`. The command line finds a method by it and by nothing else.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError

KINDS = ("str", "int", "float", "bool", "pairs", "texts", "positions", "steering")
TAKES = ("pairs", "texts", "nothing")


@dataclass(frozen=True)
class Option:
    """An option of a method: a keyword of its function, and an option of its command.

    `kind` is one of `KINDS`: a number, a text, a flag, or a file (of pairs, of texts, of a steering) that is read
    before the function sees it, or a rule of positions. `default` is what stands in the help and what the function
    gets without the option; `None` leaves it to the function.
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
    """A method: its paper, what it learns from, where it reads and acts, what it costs, its function and options.

    `takes` says what the function is given as its second argument: `"pairs"` of texts (of one of `shapes`),
    `"texts"`, or `"nothing"`. `function` is a name in the method's own module.
    """

    name: str
    title: str
    paper: str
    data: str
    reads: str
    acts: str
    function: str
    sites: str = "residual"
    cost: str = "one addition a layer and token"
    takes: str = "pairs"
    shapes: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    module: str = ""

    def __post_init__(self) -> None:
        if self.takes not in TAKES:
            raise TrimtabError(f"{self.name}: takes is one of {', '.join(TAKES)}, got {self.takes!r}")
        if (self.takes == "pairs") != bool(self.shapes):
            raise TrimtabError(f"{self.name}: a method that takes pairs, and no other, names their shapes")

    def load(self) -> Callable[..., Any]:
        """The function that learns. Imports torch."""
        function: Callable[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return function


def recipes() -> dict[str, Recipe]:
    """The methods by name, in the order of their names: one for each module of `trimtab.methods` that has a recipe.

    Raises `TrimtabError`, naming the file, for a recipe that is no literal, or two of one name.
    """
    import trimtab.methods

    found: dict[str, Recipe] = {}
    for folder in trimtab.methods.__path__:
        for path in sorted(Path(folder).glob("*.py")):
            recipe = _recipe_in(path, path.stat().st_mtime_ns)
            if recipe is None:
                continue
            if recipe.name in found:
                raise TrimtabError(f"{path}: there is a method {recipe.name!r} already, in {found[recipe.name].module}")
            found[recipe.name] = recipe
    return dict(sorted(found.items()))


@cache
def _recipe_in(path: Path, _changed: int) -> Recipe | None:
    text = path.read_text(encoding="utf-8")
    if "RECIPE" not in text:
        return None
    for node in ast.parse(text).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(target, ast.Name) and target.id == "RECIPE":
            assert node.value is not None
            try:
                recipe = _evaluated(node.value)
                if not isinstance(recipe, Recipe):
                    raise ValueError("it is no Recipe(…)")
                values = {f.name: getattr(recipe, f.name) for f in fields(Recipe)}
                return Recipe(**{**values, "module": f"trimtab.methods.{path.stem}"})
            except (ValueError, TypeError, KeyError, TrimtabError) as error:
                raise TrimtabError(f"{path}: RECIPE can't be read ({error}); write literals only") from None
    return None


def _evaluated(node: ast.expr) -> Any:
    """The value of a literal in which `Recipe` and `Option` may be called."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        make: Any = {"Recipe": Recipe, "Option": Option}[node.func.id]
        if any(keyword.arg is None for keyword in node.keywords):
            raise ValueError("** can't be read")
        given = {str(keyword.arg): _evaluated(keyword.value) for keyword in node.keywords}
        return make(*(_evaluated(argument) for argument in node.args), **given)
    if isinstance(node, ast.Tuple):
        return tuple(_evaluated(item) for item in node.elts)
    return ast.literal_eval(node)
