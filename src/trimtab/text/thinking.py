"""The markers around a model's thinking, and whether a prompt ends inside them."""

from __future__ import annotations

from typing import Any

from trimtab.text.markers import THINKING_PAIRS, has_markers


def thinking_of(tokenizer: Any) -> tuple[str, str] | None:
    """The texts that open and close thinking; `None` if the model has none that are known."""
    return next((pair for pair in THINKING_PAIRS if has_markers(tokenizer, *pair)), None)


def ends_in_thinking(tokenizer: Any, ids: list[int], thinking: tuple[str, str]) -> bool:
    """Whether a prompt ends with the marker that opens thinking, as with some templates."""
    return str(tokenizer.decode(ids[-16:], skip_special_tokens=False)).rstrip().endswith(thinking[0])
