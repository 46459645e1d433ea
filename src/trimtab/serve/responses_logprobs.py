"""Log-probabilities in the Responses API: of the tokens that make up its texts.

They belong to a text there, not to an answer: tokens of thinking, of calls, of the markers around them and the end
token have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.serve.schema_responses import LikelyToken, TextToken
from trimtab.serve.tasks import GeneratedToken
from trimtab.serve.wire import token_entry
from trimtab.text.answer_parts import AnswerPart, AnswerText


class TextTokens:
    """Finds the tokens of an answer that make up its texts, while they are generated."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._pending: list[GeneratedToken] = []
        self._begun = False  # whether the last part was text, which may continue

    def take(self, parts: Sequence[AnswerPart], tokens: Sequence[GeneratedToken]) -> list[TextToken]:
        """The tokens of the text in these parts, which came with these tokens; tokens without a part yet wait."""
        self._pending += tokens
        if not parts:
            return []
        words = "".join(part.text for part in parts if isinstance(part, AnswerText))
        came, self._pending = self._pending, []
        text_tokens = [self._text_token(token) for token in self._of(words, came)] if words else []
        self._begun = isinstance(parts[-1], AnswerText)
        return text_tokens

    def _of(self, words: str, candidates: list[GeneratedToken]) -> list[GeneratedToken]:
        """The tokens that make up the words: without a marker or blanks before a text, and without the end token."""
        texts = [self._text(token) for token in candidates]
        while texts and texts[-1] and texts[-1] not in words and candidates[len(texts) - 1].id in self._special:
            texts.pop()
        candidates, start = candidates[: len(texts)], 0
        while not self._begun and start < len(candidates) and "\ufffd" not in texts[start]:  # part of a character
            said = "".join(texts[start:])
            if said.startswith(words) or words.startswith(said):
                return candidates[start:]
            start += 1
        return candidates

    def _text_token(self, token: GeneratedToken) -> TextToken:
        top = [LikelyToken(**self._token_entry(id, value)) for id, value in token.likeliest]
        return TextToken(**self._token_entry(token.id, token.logprob), top_logprobs=top)

    def _token_entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        fields = token_entry(self.tokenizer, token, logprob)
        return {**fields, "bytes": fields["bytes"] or []}  # always a list in this API

    def _text(self, token: GeneratedToken) -> str:
        return str(self.tokenizer.decode([token.id]))

    @property
    def _special(self) -> set[int]:
        return set(self.tokenizer.all_special_ids)
