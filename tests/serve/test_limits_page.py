"""docs/serving-limits.md lists every code that the server says, every option that is a limit, and its numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="serving needs trimtab[serve]")

from trimtab.serve import bodies, bounds, connections, library, sieve
from trimtab.serve.answering import CODES
from trimtab.serve.playground import choices
from trimtab.serve.service import Limits

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving-limits.md").read_text(encoding="utf-8")
SOURCES = [path.read_text(encoding="utf-8") for path in (ROOT / "src" / "trimtab" / "serve").rglob("*.py")]


def test_every_code_is_there() -> None:
    said = {code for source in SOURCES for code in re.findall(r'code="([a-z_]+)"', source)} | set(CODES.values())
    assert len(said) > 8
    assert said == set(re.findall(r"^\| \d+ \| `([a-z_]+)`", PAGE, re.MULTILINE))


def test_every_option_that_is_a_limit_is_there() -> None:
    source = (ROOT / "src" / "trimtab" / "commands" / "serve.py").read_text(encoding="utf-8")
    signature = source[source.index("def serve(") : source.index(") -> None:")]
    options = re.findall(
        r"^    (\w+): Annotated(?:(?!^    \w+: ).)*?rich_help_panel=LIMITS", signature, re.MULTILINE | re.DOTALL
    )
    assert {"rows", "connections", "max_upload", "max_held"} <= set(options)
    for name in options:
        assert f"`--{name.replace('_', '-')}`" in PAGE, name


def test_numbers() -> None:
    limits = Limits()
    for words, value in (
        ("bytes of a request | `--max-body` | 1 MiB", limits.body >> 20),
        ("`--max-upload` | 16 MiB", limits.upload >> 20),
        ("`--max-held` | 256 MiB", limits.total_bytes >> 20),
        ("without a key | | 16 KiB", bodies.SMALL >> 10),
        ("64, 1000, 32", (sieve.FIELDS, sieve.ITEMS, sieve.DEPTH)),
        ("| 10, 30 |", (int(connections.HEAD_SECONDS), int(bodies.SECONDS))),
        ("read some of its response | | 60", int(connections.READ_SECONDS)),
        ("when others want its place | | 75; 5", (int(connections.KEEP_SECONDS), int(connections.IDLE_SECONDS))),
        ("| 256; 64; 8 |", (bounds.EDITS, bounds.TESTS, bounds.DEPTH)),
        ("| 1,000,000 |", f"{int(bounds.NORM):,}"),
        ("images of a prompt; pixels of one | `--max-images` | 8; 8,000,000", (limits.images, f"{limits.pixels:,}")),
        ("| 16; 64; 256 MiB |", (library.MOST_OWNED, library.MOST_ADDED, library.MOST_BYTES >> 20)),
        ("| 32,000; 100 |", f"{choices.LONGEST:,}"),
    ):
        assert words in PAGE, words
        for number in value if isinstance(value, tuple) else (value,):
            assert str(number) in words, (words, number)
