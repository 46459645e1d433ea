"""A self-contained HTML page: what was run, tables, figures and samples."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from trimtab.files.atomic_write import write_atomically

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: break-word }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.verdict { background: #f6f6f4; border-left: 4px solid #33658a; padding: .6rem 1rem; margin: 1rem 0 }
.verdict ul { margin: 0; padding-left: 1.1rem } .verdict li { margin: .25rem 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: .6rem 0; font-size: .9rem }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e4e4e4; vertical-align: top }
th { color: #666; font-weight: 500 } td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.name { min-width: 7rem }
dl { font-size: .9rem } dt { font-weight: 600; margin-top: .4rem } dd { margin: 0; color: #666 }
img { max-width: 100% } figure { margin: 1rem 0 } figcaption { color: #666; font-size: .9rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: .5rem .7rem; margin: .2rem 0 }
@media (prefers-color-scheme: dark) {
  body { background: #1b1b1b; color: #ddd } pre, .verdict { background: #262626 } img { background: #fff }
  th, td { border-color: #383838 } th, dd, figcaption { color: #aaa } }
"""


@dataclass(frozen=True)
class Grid:
    """A table: its title, the column heads, and rows of text, each of which begins with its name."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """A PNG and its caption."""

    png: bytes
    caption: str


@dataclass(frozen=True)
class Sample:
    """One item: its prompt, and each arm's answer."""

    prompt: str
    answers: tuple[tuple[str, str], ...]


def write_page(
    path: Path,
    title: str,
    facts: Sequence[tuple[str, str]],
    grids: Sequence[Grid],
    pictures: Sequence[Picture],
    samples: Sequence[Sample],
    *,
    verdict: Sequence[str],
    legend: Sequence[tuple[str, str]],
) -> None:
    """Write the page atomically. It is self-contained: no scripts, nothing is fetched, all text is escaped.

    Args:
        path: The page to write.
        title: Its title.
        facts: What was run, as names and values.
        grids: The tables.
        pictures: The figures.
        samples: Items with their answers.
        verdict: The results in words, one sentence each, shown at the top.
        legend: Each term on the page, and what it means.

    Raises:
        TrimtabError: It can't be written there.
    """
    sentences = "".join(f"<li>{escape(line)}" for line in verdict)
    terms = "".join(f"<dt>{escape(term)}<dd>{escape(meaning)}" for term, meaning in legend)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<div class=verdict><ul>{sentences}</ul></div>",
        _grid(Grid("", (), tuple(facts))),
        f"<h2>What the terms mean</h2>\n<dl>{terms}</dl>",
    ]
    parts += [_grid(grid) for grid in grids]
    parts += ["<h2>Figures</h2>"] if pictures else []
    for picture in pictures:
        source = base64.b64encode(picture.png).decode()
        caption = escape(picture.caption)
        parts.append(
            f'<figure><img alt="{caption}" src="data:image/png;base64,{source}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    parts += ["<h2>Samples</h2>"] if samples else []
    for sample in samples:
        parts.append(f"<pre>{escape(sample.prompt)}</pre>")
        parts.append(_grid(Grid("", ("arm", "answer"), sample.answers), numbers=False))
    head = "<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    page = f"{head}<title>{escape(title)}</title><style>{STYLE}</style>\n"
    write_atomically(path, (page + "\n".join(parts) + "\n").encode("utf-8", "backslashreplace"))


def _grid(grid: Grid, numbers: bool = True) -> str:
    """The table as HTML; a wide one scrolls inside its box, by keyboard too."""
    head = "<tr>" + "".join(f"<th>{escape(cell)}" for cell in grid.head) + "\n" if grid.head else ""
    kind = " class=n" if numbers and grid.title else ""
    rows = ["<tr><td class=name>" + f"<td{kind}>".join(escape(cell) for cell in row) for row in grid.rows]
    title = f"<h2>{escape(grid.title)}</h2>" if grid.title else ""
    return f"{title}<div class=wide tabindex=0><table>{head}" + "\n".join(rows) + "</table></div>"
