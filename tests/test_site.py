"""The documentation site: it builds without a warning, has every page and public name, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

import trimtab

ROOT = Path(__file__).parents[1]
PAGES = {str(page.relative_to(ROOT / "docs")): page.read_text() for page in ROOT.glob("docs/**/*.md")}
MENU = set(re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]))
pytest.importorskip("mkdocs", reason="the site is built by mkdocs: pip install 'trimtab[docs]'")


def test_every_page_is_in_the_menu() -> None:
    """Quick forms, of what is written; those of the site itself, which takes long to build, are below."""
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
@pytest.mark.long
def test_every_page_is_there_and_in_the_menu(site: Path) -> None:
    menu = (site / "index.html").read_text()
    for page in ROOT.glob("docs/**/*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        if str(name) == "index":
            continue
        assert (site / name / "index.html").is_file()
        assert f'href="{name}/"' in menu


@pytest.mark.slow
@pytest.mark.long
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
@pytest.mark.long
def test_every_public_name_and_command_is_in_the_reference(site: Path) -> None:
    names = (site / "reference" / "api" / "index.html").read_text()
    for name in trimtab.__all__:
        assert re.search(rf'id="trimtab\.[\w.]*\b{name}"', names), name
    commands = (site / "reference" / "cli" / "index.html").read_text()
    for command in ("trimtab make", "trimtab learn", "trimtab eval ab", "trimtab serve"):
        assert f">{command}<" in commands


@pytest.mark.slow
@pytest.mark.long
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """A page that is read offline, or by somebody who wants no one to know, asks no other server for anything."""
    text = (site / "index.html").read_text()
    loaded = re.findall(r'<(?:script|img|link)(?! rel="canonical")[^>]+(?:src|href)="(https?://[^"]+)"', text)
    assert not loaded
