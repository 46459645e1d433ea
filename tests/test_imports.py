"""Imports point one way: what stands low knows nothing of what stands above it."""

from __future__ import annotations

import ast
from pathlib import Path

import trimtab

ROOT = Path(trimtab.__file__).parent
STEERING = {"errors", "steering"}
ENGINES = STEERING | {"text", "files", "decoding", "engines"}
LM = ENGINES | {"lm"}
MAY_SEE = {
    "errors": set(),
    "steering": STEERING,
    "text": {"errors", "text"},
    "data": {"errors", "text", "data"},
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
}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def area(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The areas of trimtab that a file imports when it runs; what only type checkers see doesn't count."""
    tree = ast.parse((ROOT / path).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("trimtab."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("trimtab.")}
    return found


def test_imports_point_down() -> None:
    known = [path for path in MODULES if area(path) in MAY_SEE]
    upwards = {str(path): imported(path) - MAY_SEE[area(path)] for path in known}
    assert {path: areas for path, areas in upwards.items() if areas} == {}


def test_every_area_has_its_place() -> None:
    everything = {"commands", "serve", "__init__", "__main__"}
    assert {area(path) for path in MODULES} <= set(MAY_SEE) | everything


def test_the_vocabulary_runs_without_transformers() -> None:
    for path in MODULES:
        if area(path) in ("steering", "text", "files", "data"):
            tree = ast.parse((ROOT / path).read_text())
            modules = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert not any(module.startswith("transformers") for module in modules), path
