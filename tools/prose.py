"""Find phrases that read as translated, or that use a private word where the field has a common one.

    python tools/prose.py

It reads the pages of the documentation, the help of the commands, and the docstrings of the public names, and prints
each such phrase with what to write instead. It exits with 1 if it finds any. Code is left out. Add a phrase to
`PHRASES` when you have replaced it everywhere. Of code, tests included, it checks that no name is in `VAGUE`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "trimtab"
PAGES = ("*.md", "docs/**/*.md", "examples/*.md")
LEFT_OUT = ("CHANGELOG.md", "families.md")
"""Pages that are a record, or that a script writes."""

PHRASES = {
    r"comes? along": "is included, comes with",
    r"in the place of": "instead of, replaces",
    r"what (is|was|are) (told|asked)": "name the thing: the request, the response",
    r"to the bit": "bit for bit",
    r"whole or not at all": "atomically",
    r"falls? apart": "breaks",
    r"holds? together": "is intact",
    r"heed(s|ed)?": "follow",
    r"holds? (the|an) instruction": "follow the instruction",
    r"anew": "again",
    r"rungs?": "candidate",
    r"raw (token|model|stream|row)s?": "unsteered",
    r"hasn't got|haven't got": "doesn't have",
    r"out of balance": "unbalanced",
    r"goes? in circles": "is repetitive",
    r"Without it: ": "Default: ",
    r"(one|two|nats|tokens|seconds|bytes) a (line|token|layer|second|row|pair|prompt|request|step|pass)": "per",
    r"a (layer|token) and (layer|token)": "per layer and token",
    r"so many (tokens|of the|at most|engines|nats|bytes)": "this many, at most N",
    r"in so far as|inasmuch as": "if, as far as",
    r"where there (is|are) (none|one|any)": "if there is",
    r"of whatever (kind|program|sort)": "any",
    r"told apart by": "distinguished by",
    r"brings? (it |them )?about": "produces",
    r"by a stopwatch": "by timing",
    r"puts? out": "outputs, returns",
    r"(is|are) that of nothing": "is empty",
    r"(turned|turn) away": "refused",
    r"who asks for": "a request for",
    r"as (it|he|they) has it": "as in",
    r"it is the edits' strength": "this is the edits' strength",
    r"pictures? \(": "images",
    r"(could|can) be had": "is supported",
    r"to begin with is what": "the suggested",
    r"lengths of the activation": "relative norm",
    r"in the manner of": "like, following",
}
"""Each a regular expression of whole words, and what to write instead."""

CODE = ("src/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "tools/*.py", "examples/**/*.py")
VAGUE = {"one", "found", "told", "given", "asked"}
"""What no variable, parameter or function is called: these say nothing about what they hold."""


@dataclass(frozen=True)
class Finding:
    """A phrase, where it is, and what to write instead."""

    path: Path
    line: int
    phrase: str
    advice: str


def without_code(text: str) -> str:
    """A page with its code blanked out, in as many lines."""
    text = re.sub(r"(?ms)^ *(`{3,}).*?^ *\1", lambda block: "\n" * block[0].count("\n"), text)
    return re.sub(r"`[^`]*`", lambda code: "`" + "\n" * code[0].count("\n") + "`", text)


def phrases(path: Path, line: int, text: str) -> Iterator[Finding]:
    """The phrases in a text that begins at this line."""
    for phrase, advice in PHRASES.items():
        spaced = rf"(?<![\w-])(?:{phrase})(?!\w)".replace(" ", r"\s+")
        for match in re.finditer(spaced, text, 0 if phrase[0].isupper() else re.IGNORECASE):
            yield Finding(path, line + text[: match.start()].count("\n"), " ".join(match[0].split()), advice)


def public_names() -> set[str]:
    """The names that `trimtab` exports, as its `__init__` imports them for type checkers."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports for alias in node.names}


def texts(path: Path, names: set[str]) -> Iterator[tuple[int, str]]:
    """What users read of a module: the help of a command, the docstrings of the public names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    command = path.parent.name == "commands"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (command or node.name in names):
            for part in ast.walk(node):
                if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and not part.name.startswith("_"):
                    if (text := ast.get_docstring(part, clean=False)) is not None:
                        yield part.body[0].lineno, text
                elif isinstance(part, ast.keyword) and part.arg == "help" and isinstance(part.value, ast.Constant):
                    yield part.value.lineno, str(part.value.value)


def vague_names(path: Path) -> Iterator[Finding]:
    """The names in `VAGUE` that a module uses. A field that is only declared may be: it is read as an attribute."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    declared = [node.target for node in nodes if isinstance(node, ast.AnnAssign) and node.value is None]
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node not in declared:
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            name = node.name
        else:
            continue
        if name in VAGUE:
            yield Finding(path, node.lineno, name, "a name that says what it holds")


def everything() -> Iterator[Finding]:
    """The phrases on all pages, and in all that is shown of the package."""
    for page in sorted({page for pattern in PAGES for page in ROOT.glob(pattern)}):
        if page.name not in LEFT_OUT:
            yield from phrases(page, 1, without_code(page.read_text(encoding="utf-8")))
    names = public_names()
    for module in sorted(PACKAGE.rglob("*.py")):
        for line, text in texts(module, names):
            yield from phrases(module, line, without_code(text))
    for module in sorted({module for pattern in CODE for module in ROOT.glob(pattern)}):
        yield from vague_names(module)


def main() -> int:
    """Print what was found; the exit status."""
    findings = list(everything())
    for finding in findings:
        print(f"{finding.path.relative_to(ROOT)}:{finding.line}: {finding.phrase!r}; write: {finding.advice}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
