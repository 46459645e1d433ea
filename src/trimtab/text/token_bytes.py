"""The bytes of a token that is only a part of a character and has no text of its own."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

BROKEN = "\ufffd"  # what an incomplete character decodes to


def token_bytes(tokenizer: Any, token: int) -> bytes | None:
    """The UTF-8 bytes that the token adds to an answer, from its form in the vocabulary; `None` if they aren't known.

    Vocabularies represent parts of characters in one of two ways: as `<0xE2>` (SentencePiece's byte fallback), or with
    a printable character for each byte (GPT-2's, and most since).
    """
    piece = tokenizer.convert_ids_to_tokens(int(token))
    if not isinstance(piece, str):
        return None
    if match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece):
        return bytes([int(match[1], 16)])
    table = _printable()
    return bytes(table[c] for c in piece) if all(c in table for c in piece) else None


@cache
def _printable() -> dict[str, int]:
    """GPT-2's character for each byte: the byte itself if it is printable, otherwise the next one from 256 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in own}
    others = [byte for byte in range(256) if byte not in own]
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}
