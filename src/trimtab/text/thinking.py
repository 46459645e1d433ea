"""Between which texts a model thinks, and whether a prompt ends in between."""

from __future__ import annotations

from typing import Any

from trimtab.text.markers import THINKING_PAIRS, has_markers


def thinking_of(tokenizer: Any) -> tuple[str, str] | None:
    """What opens and closes thinking; `None` where nothing is known to."""
    return next((pair for pair in THINKING_PAIRS if has_markers(tokenizer, *pair)), None)


def is_thinking(tokenizer: Any, ids: list[int], thinking: tuple[str, str]) -> bool:
    """Whether a prompt ends with the marker that opens thinking, as some templates have it."""
    return str(tokenizer.decode(ids[-16:], skip_special_tokens=False)).rstrip().endswith(thinking[0])
