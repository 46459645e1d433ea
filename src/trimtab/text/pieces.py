"""The text that each token of an answer adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.text.detokenizer import Detokenizer


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; joined, the whole text. A character of several tokens belongs to the last one."""
    detokenizer = Detokenizer(tokenizer)
    texts = [detokenizer.add(token) for token in ids]
    if texts:
        texts[-1] += detokenizer.finish()
    return texts
