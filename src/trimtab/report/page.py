"""A self-contained HTML page: what was run, tables, figures and samples."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from trimtab.files.atomic_write import write_atomically

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .6rem 0; font-size: .9rem; display: block; overflow-x: auto }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e4e4e4; vertical-align: top }
th { color: #666; font-weight: 500 } td.n { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100% } figure { margin: 1rem 0 } figcaption { color: #666; font-size: .9rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: .5rem .7rem; margin: .2rem 0 }
@media (prefers-color-scheme: dark) {
  body { background: #1b1b1b; color: #ddd } pre { background: #262626 } img { background: #fff }
  th, td { border-color: #383838 } th, figcaption { color: #aaa } }
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
) -> None:
    """Write the page atomically. It is self-contained: no scripts, nothing is fetched, all text is escaped.

    Raises `TrimtabError` if it can't be written there.
    """
    parts = [f"<h1>{escape(title)}</h1>", _grid(Grid("", ("", ""), tuple(facts)))]
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
    page = f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>\n"
    write_atomically(path, (page + "\n".join(parts) + "\n").encode("utf-8", "backslashreplace"))


def _grid(grid: Grid, numbers: bool = True) -> str:
    head = "".join(f"<th>{escape(cell)}" for cell in grid.head)
    kind = " class=n" if numbers and grid.title else ""
    rows = ["<tr><td>" + f"<td{kind}>".join(escape(cell) for cell in row) for row in grid.rows]
    title = f"<h2>{escape(grid.title)}</h2>" if grid.title else ""
    return f"{title}<table><tr>{head}\n" + "\n".join(rows) + "</table>"
