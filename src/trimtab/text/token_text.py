"""The bytes that each token adds to a text, for searching a text while tokens arrive one at a time.

A token may end in the middle of a word or of a character; its bytes are still its own. Special tokens count as the text
they are written as.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

from trimtab.text.token_bytes import BROKEN, token_bytes

KEPT = 65_536
"""The maximum number of tokens, or pairs of adjacent tokens, in the cache."""


class TokenText:
    """The tokens of one tokenizer.

    In a byte-level vocabulary (GPT-2's, and most since), a token adds the same bytes in any context. In others it
    depends on the token before it, since the space before the first word is dropped. Then the token's text is the
    difference between decoding both tokens and decoding the first.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = ref(tokenizer)  # a weak reference, since instances may be cached by tokenizer
        self._special_texts = {
            int(i): str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        }
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._of_bytes = type(decoder).__name__ == "ByteLevel"
        self._known: dict[tuple[int, int], bytes] = {}

    def added_bytes(self, before: int, token: int) -> bytes:
        """The bytes that a token adds after the one before it."""
        key = (-1 if self._of_bytes else before, token)
        addition = self._known.get(key)
        if addition is None:
            if len(self._known) >= KEPT:
                self._known.clear()
            addition = self._known[key] = self._added(before, token)
        return addition

    def _added(self, before: int, token: int) -> bytes:
        if token in self._special_texts:
            return self._special_texts[token].encode()
        if self._of_bytes:
            return token_bytes(self._tokenizer(), token) or b""
        both, first = self._decode(before, token), self._decode(before)
        text = both[len(first) :] if both.startswith(first) else self._decode(token)
        if BROKEN in text:  # a part of a character
            return token_bytes(self._tokenizer(), token) or text.encode()
        return text.encode()

    def _decode(self, *tokens: int) -> str:
        tokenizer: Any = self._tokenizer()
        return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))
