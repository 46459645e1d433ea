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


def answer_ids(tokenizer: Any, letter: str, *, after_space: bool = False) -> tuple[list[int], int, list[int]]:
    """The ids of `(`, of the letter, and of `)`; the letter is one token, the same wherever it stands.

    Tokenizers may merge the bracket and the letter (Qwen2.5's do after a newline): then the letter's position
    would not be a letter, and a scoring prompt that ends with `(` would look like nothing the model has read.
    Where that happens the parts are put together by id. `after_space` takes the bracket that follows a space.

    Raises `TrimtabError` when the letter is no single token.
    """
    opening = " (" if after_space else "("
    whole = _ids(tokenizer, f"{opening}{letter})")
    where = [i for i, token in enumerate(whole) if tokenizer.decode([token]).strip() == letter]
    if len(where) == 1:
        return whole[: where[0]], whole[where[0]], whole[where[0] + 1 :]
    alone = _ids(tokenizer, letter)
    if len(alone) != 1:
        raise TrimtabError(f"{letter!r} is {len(alone)} tokens in this tokenizer, so letter answers can't be read")
    return _ids(tokenizer, opening), alone[0], _ids(tokenizer, ")")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
