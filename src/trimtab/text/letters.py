"""Multiple-choice answers such as `(A)` as token ids, on any tokenizer."""

from __future__ import annotations

import re
from typing import Any

from trimtab.errors import TrimtabError

ANSWER = re.compile(r"\(([A-Z])\)")


def letter_of(answer: str) -> str:
    """`"A"` of `"(A)"`. Raises `TrimtabError` for anything else."""
    match = ANSWER.fullmatch(answer.strip())
    if match is None:
        raise TrimtabError(f"the answer {answer!r} is no bracketed letter such as (A)")
    return match[1]


def answer_ids(tokenizer: Any, letter: str, *, after_space: bool = False) -> tuple[int, int, int]:
    """The ids of `(`, the letter and `)`, as three tokens, the same for every letter.

    Tokenizers may merge the bracket and the letter (Qwen2.5's do after a newline): then the letter's position
    would not be a letter, and a scoring prompt that ends with `(` would look like nothing the model has read.
    So the three are put together by id. `after_space` takes the bracket that follows a space.

    Raises `TrimtabError` when one of them is no single token.
    """
    opening = " (" if after_space else "("
    whole = _ids(tokenizer, f"{opening}{letter})")
    if len(whole) == 3:
        return whole[0], whole[1], whole[2]
    parts = [_ids(tokenizer, part) for part in (opening, letter, ")")]
    for part, ids in zip((opening, letter, ")"), parts, strict=True):
        if len(ids) != 1:
            raise TrimtabError(f"{part!r} is {len(ids)} tokens in this tokenizer, so letter answers can't be read")
    return parts[0][0], parts[1][0], parts[2][0]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
