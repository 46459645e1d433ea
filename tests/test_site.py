"""The documentation site: it builds without a warning, has every page and public name, and its links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from urllib.parse import unquote

import pytest

import trimtab

ROOT = Path(__file__).parents[1]
PAGES = {str(page.relative_to(ROOT / "docs")): page.read_text() for page in ROOT.glob("docs/**/*.md")}
MENU = set(re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]))
pytest.importorskip("mkdocs", reason="the site is built by mkdocs: pip install 'trimtab[docs]'")


def test_every_page_is_in_the_menu() -> None:
    """Quick forms, of what is written; those of the site itself, which takes half a minute to build, are below."""
    assert set(PAGES) <= MENU


def test_the_site_has_an_address_and_its_versions() -> None:
    """What mike needs for the menu of versions, and what the package's page on PyPI leads to."""
    config = (ROOT / "mkdocs.yml").read_text()
    (address,) = re.findall(r'(?m)^Documentation = "(.*)"$', (ROOT / "pyproject.toml").read_text())
    assert f"\nsite_url: {address}\n" in config
    assert "\n    provider: mike" in config


def test_links_from_page_to_page_lead_to_what_is_there() -> None:
    for page, text in PAGES.items():
        words = re.sub(r"^```.*?^```|^    .*?$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", words):
            if not re.match(r"[a-z]+:|#", link):
                target = (ROOT / "docs" / page).parent / link.partition("#")[0]
                name = os.path.relpath(target, ROOT / "docs")
                assert target.exists() or name in MENU, f"{page} links to {link}"  # some are made of the code


def _reference() -> set[str]:
    """The dotted names that the Python reference has an entry for."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from site_pages import api_page
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return set(re.findall(r"^::: ([\w.]+)$", api_page(), re.MULTILINE))


def _public_functions() -> Iterator[tuple[str, FunctionType]]:
    """The public functions, and the public methods and properties of the public classes."""
    for name in trimtab.__all__:
        public = inspect.unwrap(getattr(trimtab, name))
        if inspect.isfunction(public):
            yield name, public
        for member in [] if not inspect.isclass(public) else [each for each in dir(public) if each[0] != "_"]:
            value = inspect.getattr_static(public, member)
            value = getattr(value, "__func__", getattr(value, "fget", value))
            if inspect.isfunction(value):
                yield f"{name}.{member}", inspect.unwrap(value)


def _annotated(function: FunctionType) -> Iterator[type]:
    """The package's own classes in the annotation of what a function returns, which may be imported for types only."""
    module = sys.modules[function.__module__]
    deferred = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trimtab")
        for alias in node.names
    }
    for name in re.findall(r"\w+", str(function.__annotations__.get("return", ""))):
        value = getattr(module, name, None)
        if value is None and name in deferred:
            home, original = deferred[name]
            value = getattr(importlib.import_module(str(home)), original)
        if inspect.isclass(value) and value.__module__.startswith("trimtab"):
            yield value


def test_the_reference_has_every_class_that_a_public_call_returns() -> None:
    entries = _reference()
    returned = {(name, kind) for name, function in _public_functions() for kind in _annotated(function)}
    assert {"Generation", "Sweep", "Divergence"} <= {kind.__name__ for _, kind in returned}
    missing = {name: kind for name, kind in returned if f"{kind.__module__}.{kind.__name__}" not in entries}
    assert not missing


def test_the_reference_has_every_name_that_a_page_imports() -> None:
    entries = _reference()
    for page, text in PAGES.items():
        for code in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trimtab."):
                    for alias in node.names:
                        value = getattr(importlib.import_module(str(node.module)), alias.name)
                        home = getattr(value, "__module__", node.module)
                        assert f"{home}.{alias.name}" in entries, f"{page} imports {alias.name} from {node.module}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr.strip(), done.stderr
    return folder


@pytest.mark.slow
def test_every_page_is_there_and_in_the_menu(site: Path) -> None:
    menu = (site / "index.html").read_text()
    for page in ROOT.glob("docs/**/*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        if str(name) == "index":
            continue
        name = name.parent if name.name == "index" else name
        assert (site / name / "index.html").is_file()
        assert f'href="{name}/"' in menu


@pytest.mark.slow
def test_links_within_the_site_lead_to_what_is_there(site: Path) -> None:
    pages = {page: page.read_text() for page in site.rglob("*.html") if page.name != "404.html"}
    anchors = {page: set(re.findall(r'id="([^"]+)"', text)) for page, text in pages.items()}
    for page, text in pages.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = unquote(link).partition("#")
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.relative_to(site)} links to {link}"
            if anchor and target in anchors and not anchor.startswith("__"):
                assert anchor in anchors[target], f"{page.relative_to(site)} links to {link}"


@pytest.mark.slow
def test_every_public_name_and_command_is_in_the_reference(site: Path) -> None:
    names = (site / "reference" / "api" / "index.html").read_text()
    for name in trimtab.__all__:
        assert re.search(rf'id="trimtab\.[\w.]*\b{name}"', names), name
    commands = (site / "reference" / "cli" / "index.html").read_text()
    for command in ("trimtab make", "trimtab learn", "trimtab eval ab", "trimtab serve"):
        assert f">{command}<" in commands


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """A page that is read offline, or by somebody who wants no one to know, asks no other server for anything."""
    text = (site / "index.html").read_text()
    loaded = re.findall(r'<(?:script|img|link)(?! rel="canonical")[^>]+(?:src|href)="(https?://[^"]+)"', text)
    assert not loaded
