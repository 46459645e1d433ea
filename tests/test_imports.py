"""Imports point one way: what stands low knows nothing of what stands above it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import trimtab

ROOT = Path(trimtab.__file__).parent
STEERING = {"keywords", "errors", "deprecation", "steering"}
ENGINES = STEERING | {"plugins", "text", "files", "decoding", "engines"}
LM = ENGINES | {"lm"}
MAY_SEE = {
    "errors": set(),
    "deprecation": set(),
    "keywords": {"errors"},
    "plugins": {"errors"},
    "steering": STEERING,
    "text": {"errors", "keywords", "text"},
    "data": {"errors", "keywords", "text", "data"},
    "files": STEERING | {"files"},
    "decoding": STEERING | {"decoding"},
    "engines": ENGINES,
    "lm": LM,
    "learn": ENGINES | {"learn"},
    "methods": ENGINES | {"data", "learn", "methods"},
    "evaluate": LM | {"data", "evaluate"},
    "doctor": LM | {"doctor"},
    "baking": LM | {"baking"},
    "tune": LM | {"learn", "methods", "data", "evaluate", "tune"},
    "making": LM | {"learn", "methods", "data", "evaluate", "making"},
    "report": LM | {"evaluate", "report"},
    "bench": LM | {"learn", "methods", "data", "evaluate", "tune", "making", "bench"},
}
SHORTCUTS = {
    "steering/steering.py": {"files", "report"},
    "steering/card.py": {"report"},
    "steering/cosines.py": {"report"},
    "engines/answer.py": {"report"},
    "engines/streaming.py": {"report"},
    "engines/language_model.py": {"evaluate", "report", "tune"},
    "tune/sweep.py": {"report"},
}
"""Methods that save, draw or try what they belong to: each imports a function from above where it calls it, so that
plain data can do so by itself."""
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
NAMED = re.compile(r"trimtab\.(\w+\.)+\w+(:\w+)?|trimtab\.\w+:\w+")
"""A string that names a module or what is in it, as tables of what is imported later do."""


def area(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The areas that a file imports or names, and whether only once a function runs; not what type checkers see."""
    tree = ast.parse((ROOT / path).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    later = {id(below) for function in functions for below in ast.walk(function)}
    for node in ast.walk(tree):
        for name in _named(node):
            if name.startswith("trimtab.") and name != "trimtab.__version__":
                yield name.split(".")[1], id(node) in later


def _named(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [f"trimtab.{a.name}" for a in node.names] if node.module == "trimtab" else [node.module or ""]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMED.fullmatch(node.value):
        return [node.value.partition(":")[0]]
    return []


def test_imports_point_down() -> None:
    for path in MODULES:
        if area(path) in MAY_SEE:
            upwards = {name for name, _ in imports(path) if name not in MAY_SEE[area(path)]}
            assert upwards == SHORTCUTS.get(str(path), set()), path


def test_shortcuts_import_where_they_are_called() -> None:
    for path, areas in SHORTCUTS.items():
        assert all(later for name, later in imports(Path(path)) if name in areas), path


def test_tables_of_names_are_seen() -> None:
    assert {"methods"} <= {name for name, _ in imports(Path("methods/own.py"))}
    assert {"engines"} <= {name for name, _ in imports(Path("engines/__init__.py"))}


def test_nothing_is_imported_by_a_name_that_is_put_together() -> None:
    """Names of modules stand written out where they are imported, so that the tests above see them."""
    at_run_time = {
        path
        for path in MODULES
        if area(path) in MAY_SEE and re.search(r"\bimport_module\(|__import__\(", (ROOT / path).read_text())
    }
    assert {str(path) for path in at_run_time} <= {"engines/vllm/requests.py"}  # modules of vLLM's own


def test_every_area_has_its_place() -> None:
    everything = {"commands", "serve", "__init__", "__main__"}
    assert {area(path) for path in MODULES} <= set(MAY_SEE) | everything


def test_the_vocabulary_runs_without_transformers() -> None:
    for path in MODULES:
        if area(path) in ("steering", "text", "files", "data"):
            tree = ast.parse((ROOT / path).read_text())
            modules = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert not any(module.startswith("transformers") for module in modules), path
