"""Incremental detokenization: whole characters only, and nothing that may be part of a stop text.

`tokenizers.decoders.DecodeStream` doesn't replace this: it has only `step`, so that an incomplete character at the end
of an answer never comes out; it skips all special tokens or none, while some of them are shown here; and it takes a
tokenizer of `tokenizers`, which slow tokenizers and llama.cpp's don't have.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from trimtab.text.token_bytes import BROKEN


class Detokenizer:
    """Detokenizes one answer. `add` takes a token and returns the text that can be shown now; `finish` returns the
    rest.

    All pieces together are the decoded tokens, up to the first of the `stop` texts, which is excluded; `stopped` says
    whether one has occurred. Special tokens are left out, except for those in `shown_special_ids`.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), shown_special_ids: Collection[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop: tuple[str, ...] = tuple(stop)
        self.shown_special_ids: frozenset[int] = frozenset(shown_special_ids)
        self.stopped = False
        self._tokens: list[int] = []
        self._context = 0  # decoding starts here, as a tokenizer may treat the first token specially
        self._decoded = 0  # tokens whose text is known
        self._pending = ""

    def add(self, token: int) -> str:
        """The text that can be shown after this token."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        known = self._decode(self._tokens[self._context : self._decoded])
        whole = self._decode(self._tokens[self._context :])
        if len(whole) <= len(known) or whole.endswith(BROKEN):
            return ""
        self._context, self._decoded = self._decoded, len(self._tokens)
        return self._release(whole[len(known) :])

    def finish(self) -> str:
        """The rest, after the last token."""
        if self.stopped:
            return ""
        known = self._decode(self._tokens[self._context : self._decoded])
        rest = self._decode(self._tokens[self._context :])[len(known) :]
        self._decoded = self._context = len(self._tokens)
        shown = self._release(rest)
        pending, self._pending = self._pending, ""
        return shown + pending

    def _release(self, more: str) -> str:
        text = self._pending + more
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if places:
            self.stopped, self._pending = True, ""
            return text[: min(places)]
        pending_length = max((overlap(text, stop) for stop in self.stop), default=0)
        self._pending = text[len(text) - pending_length :]
        return text[: len(text) - pending_length]

    def _decode(self, tokens: Sequence[int]) -> str:
        if not self.shown_special_ids.intersection(tokens):
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""
        special = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        kept = [token for token in tokens if token not in special or token in self.shown_special_ids]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False))


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text may be the beginning of a stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
