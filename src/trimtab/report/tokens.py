"""The cosine of each token's activation with a direction: as colored text, as a page, and as a plot.

The CAA paper (Rimsky et al., 2312.06681, section 3) shows in this way that a vector detects the behaviour it steers.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError
from trimtab.report.plots import check_matplotlib
from trimtab.report.sweep import as_png, directions
from trimtab.report.traces import pieces

if TYPE_CHECKING:
    from rich.text import Text

    from trimtab.engines.language_model import LanguageModel as LM
    from trimtab.steering import Steering

BLUE, RED = (47, 103, 160), (184, 62, 48)  # along and against the direction, as in the colormap of the plots
DEEPEST = 0.6
"""The maximum opacity of a page's shade, so that dark and light text are readable on it."""
PER_LINE = 36
"""The number of tokens per line of the plot."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>%(title)s</title><style>
body { font: 16px/1.7 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem } .text { white-space: pre-wrap; margin: 0;
  overflow-wrap: anywhere }
.text span { border-radius: 2px } .key span { padding: .1rem .5rem; border-radius: 2px }
@media (prefers-color-scheme: dark) { body { background: #1b1b1b; color: #eee; } }
</style></head><body>
<h1>%(title)s</h1>
<p class="key">Cosine of each token's activation with the direction: %(key)s. Hold the pointer over a token for its
number.</p>
%(parts)s
</body></html>
"""


@dataclass(frozen=True)
class TokenCosines:
    """A text's tokens, as pieces that join to it, and the cosine of each one's activation with a layer's direction."""

    layer: int
    pieces: tuple[str, ...]
    cosines: tuple[float, ...]


def token_cosines(
    lm: LM, steering: Steering, text: str, layers: Sequence[int] | None = None, *, transfer: bool = False
) -> list[TokenCosines]:
    """`cos(h_l[t], v_l)` for every token of a plain text, read unsteered, at each of these layers (default: all).

    A direction that is added with a negative strength is reversed. Raises `TrimtabError` for an empty text, a layer
    without a direction or with several, and a steering of another model unless `transfer`.
    """
    import torch

    from trimtab.steering import Positions
    from trimtab.steering.tensors import to_float64

    if not isinstance(text, str):
        raise TrimtabError(f"the text is one string, got {type(text).__name__}; call this once for each text")
    vectors = directions(steering if layers is None else steering.only(layers))
    lm.check(steering, transfer=transfer)
    ids = lm.encode(text, chat=False)
    if not ids:
        raise TrimtabError("the text is empty; there is no token to read")
    (read,) = lm.capture(text, list(vectors), Positions.all(), chat=False)
    shown = tuple(pieces(lm.tokenizer, ids))
    result = []
    for site, values in read.items():
        cosines = torch.cosine_similarity(to_float64(values), vectors[site.layer][None], dim=-1)
        result.append(TokenCosines(site.layer, shown, tuple(cosines.tolist())))
    return result


def answer_cosines(
    lm: LM, steering: Steering, prompt: Sequence[int], answer: Sequence[int], layer: int
) -> TokenCosines:
    """The cosines for the tokens of an answer, read after its prompt, at one layer.

    The pieces leave out special tokens, as the answer's text does. Raises `TrimtabError` like `token_cosines`, and for
    an answer without tokens.
    """
    import torch

    from trimtab.engines.request import Text
    from trimtab.steering import Site
    from trimtab.steering.tensors import to_float64

    direction = directions(steering.only([layer]))[layer]
    ids = [*prompt, *answer]
    where = list(range(len(prompt), len(ids)))
    if not where:
        raise TrimtabError("the answer is empty; there is no token to read")
    (batch,) = lm.read([[Text(ids, where)]], [Site(layer)])
    values = batch.values[Site(layer)][0][0]
    cosines = torch.cosine_similarity(to_float64(values), direction[None], dim=-1)
    return TokenCosines(layer, tuple(pieces(lm.tokenizer, answer)), tuple(cosines.tolist()))


def color_limit(rows: Sequence[TokenCosines]) -> float:
    """The absolute cosine shown in full color: the largest without first tokens, whose activations are outliers."""
    values = [abs(value) for row in rows for value in row.cosines[1:] or row.cosines]
    return max(max(values), 1e-6)


def coloured_cosines(row: TokenCosines, full: float) -> Text:
    """The text for a terminal: blue along the direction, red against it; `full` is the result of `color_limit`."""
    from rich.style import Style
    from rich.text import Text

    text = Text()
    for piece, cosine in zip(row.pieces, row.cosines, strict=True):
        red, green, blue = _mixed(cosine, full)
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 115
        text.append(piece, Style.parse(f"{'#ffffff' if dark else '#222222'} on #{red:02x}{green:02x}{blue:02x}"))
    return text


def tokens_page(rows: Sequence[TokenCosines], title: str) -> str:
    """A self-contained HTML page with the colored text, once per layer."""
    full = color_limit(rows)
    parts = []
    for row in rows:
        parts.append(f'<h2>layer {row.layer}</h2>\n<p class="text">{cosine_spans(row, full)}</p>')
    return PAGE % {"title": html.escape(title), "key": cosine_legend(full), "parts": "\n".join(parts)}


def coloured_page_part(rows: Sequence[TokenCosines], full: float) -> str:
    """The colored text, once per layer, as HTML to embed in a page; it needs no style sheet."""
    parts = [f"<p>cosine with the direction: {cosine_legend(full)}</p>"]
    for row in rows:
        spans = cosine_spans(row, full)
        parts.append(
            f'<p style="margin: .8em 0 0; opacity: .65">layer {row.layer}</p>'
            '<div style="white-space: pre-wrap; overflow-wrap: anywhere; text-align: left; line-height: 1.7">'
            f"{spans}</div>"
        )
    return "".join(parts)


def cosine_spans(row: TokenCosines, full: float) -> str:
    """The text as HTML, each token shaded and with its cosine as a tooltip; `full` is the result of `color_limit`."""
    return "".join(
        f'<span style="background: {_shade(cosine, full)}" title="{cosine:+.3f}">{html.escape(piece)}</span>'
        for piece, cosine in zip(row.pieces, row.cosines, strict=True)
        if piece
    )


def cosine_legend(full: float) -> str:
    """The legend for the shades of `cosine_spans`, as HTML."""
    return " ".join(
        f'<span style="background: {_shade(value, full)}">{value:+.2f}</span>'
        for value in (-full, -full / 2, full / 2, full)
    )


def draw_tokens(rows: Sequence[TokenCosines], title: str) -> bytes:
    """A PNG: for one layer, bars token by token, wrapped into lines; for several, a map of layer × token.

    Raises `TrimtabError` if matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    full, count = color_limit(rows), len(rows[0].pieces)
    starts = range(0, count, PER_LINE)
    tall = 1.7 if len(rows) == 1 else 0.9 + 0.13 * len(rows)
    wide = 1.5 + 0.26 * min(count, PER_LINE)
    figure = Figure(figsize=(max(4.0, wide), 0.6 + len(starts) * (tall + 0.3)), layout="constrained")
    lines = figure.subplots(len(starts), 1, squeeze=False)[:, 0]
    for axes, start in zip(lines, starts, strict=True):
        image = _line(axes, rows, slice(start, start + PER_LINE), full, min(count, PER_LINE))
    if len(rows) > 1:
        figure.colorbar(image, ax=list(lines), shrink=0.85).set_label("cosine", fontsize=9)
    figure.suptitle(fill(title, int(11 * figure.get_figwidth())), x=0.01, ha="left", fontsize=11)
    return as_png(figure)


def draw_cosines(axes: Any, rows: Sequence[TokenCosines]) -> None:
    """Draw the cosines into matplotlib axes, in a single line of any length."""
    full = color_limit(rows)
    image = _line(axes, rows, slice(None), full, len(rows[0].pieces))
    if len(rows) > 1:
        axes.figure.colorbar(image, ax=axes, shrink=0.85).set_label("cosine", fontsize=9)


def _line(axes: Any, rows: Sequence[TokenCosines], part: slice, full: float, columns: int) -> Any:
    """Draw some of the tokens, with room for `columns` of them; returns the map, or `None` for bars."""
    image = None
    if len(rows) == 1:
        _bars(axes, rows[0], part, full)
    else:
        image = _layers(axes, rows, part, full)
    labels = [_label(piece) for piece in rows[0].pieces[part]]
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8, parse_math=False)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_visible(len(rows) == 1)
    return image


def _bars(axes: Any, row: TokenCosines, part: slice, full: float) -> None:
    values = row.cosines[part]
    colours = ["#%02x%02x%02x" % (BLUE if value > 0 else RED) for value in values]
    axes.bar(range(len(values)), values, color=colours, width=0.8)
    for i, value in enumerate(values):
        if abs(value) > 1.08 * full:  # cut off: label it with its value
            side = "top" if value > 0 else "bottom"
            at = full if value > 0 else -full
            axes.text(i, at, f"{value:+.2f}", ha="center", va=side, rotation=90, fontsize=8, color="white")
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylim(-1.08 * full, 1.08 * full)
    axes.set_ylabel("cosine", fontsize=9)
    axes.grid(axis="y", alpha=0.25)


def _layers(axes: Any, rows: Sequence[TokenCosines], part: slice, full: float) -> Any:
    values = [row.cosines[part] for row in rows]
    image = axes.imshow(values, cmap="RdBu", vmin=-full, vmax=full, aspect="auto", origin="lower")
    step = max(1, len(rows) // 8)
    shown = range(0, len(rows), step)
    axes.set_yticks(shown, [str(rows[i].layer) for i in shown], fontsize=8)
    axes.set_ylabel("layer", fontsize=9)
    return image


def _label(piece: str) -> str:
    """A token as a tick label: line breaks become visible, long pieces are cut, and empty ones become a dot."""
    text = piece.replace("\n", "⏎").strip(" ")
    return (text if len(text) <= 12 else text[:11] + "…") or "·"


def _share(cosine: float, full: float) -> float:
    return min(1.0, abs(cosine) / full)


def _mixed(cosine: float, full: float) -> tuple[int, int, int]:
    """White mixed with the color of the sign."""
    share = _share(cosine, full)
    red, green, blue = (round(255 + share * (part - 255)) for part in (BLUE if cosine > 0 else RED))
    return red, green, blue


def _shade(cosine: float, full: float) -> str:
    """The color as a shade for a page with any background."""
    red, green, blue = BLUE if cosine > 0 else RED
    return f"rgba({red},{green},{blue},{DEEPEST * _share(cosine, full):.2f})"
