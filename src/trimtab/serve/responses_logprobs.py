"""Log-probabilities in the Responses API: of the tokens that make up its texts.

They belong to a text there, not to an answer: tokens of thinking, of calls, of the markers around them and the end
token have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.serve.schema_responses import LikelyToken, TextToken
from trimtab.serve.tasks import TokenTold
from trimtab.serve.wire import named
from trimtab.text.said import Part, Words


class TextTokens:
    """Finds the tokens of an answer that make up its texts, while they are generated."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._unsaid: list[TokenTold] = []
        self._begun = False  # whether the last part was text, which may continue

    def take(self, parts: Sequence[Part], tokens: Sequence[TokenTold]) -> list[TextToken]:
        """The tokens of the text in these parts, which came with these tokens; tokens without a part yet wait."""
        self._unsaid += tokens
        if not parts:
            return []
        words = "".join(part.text for part in parts if isinstance(part, Words))
        came, self._unsaid = self._unsaid, []
        text_tokens = [self._text_token(token) for token in self._of(words, came)] if words else []
        self._begun = isinstance(parts[-1], Words)
        return text_tokens

    def _of(self, words: str, came: list[TokenTold]) -> list[TokenTold]:
        """The tokens that make up the words: without a marker or blanks before a text, and without the end token."""
        texts = [self._text(token) for token in came]
        while texts and texts[-1] and texts[-1] not in words and came[len(texts) - 1].id in self._special:
            texts.pop()
        came, start = came[: len(texts)], 0
        while not self._begun and start < len(came) and "\ufffd" not in texts[start]:  # part of a character
            said = "".join(texts[start:])
            if said.startswith(words) or words.startswith(said):
                return came[start:]
            start += 1
        return came

    def _text_token(self, token: TokenTold) -> TextToken:
        top = [LikelyToken(**self._named(id, value)) for id, value in token.likeliest]
        return TextToken(**self._named(token.id, token.logprob), top_logprobs=top)

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        fields = named(self.tokenizer, token, logprob)
        return {**fields, "bytes": fields["bytes"] or []}  # always a list in this API

    def _text(self, token: TokenTold) -> str:
        return str(self.tokenizer.decode([token.id]))

    @property
    def _special(self) -> set[int]:
        return set(self.tokenizer.all_special_ids)
