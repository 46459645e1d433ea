"""Phrases to emphasize, searched for in the prompt while a user types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.serve.service import Service


@dataclass(frozen=True)
class Mark:
    """A phrase, and the number of the prompt's tokens in its occurrences, or why there are none."""

    phrase: str
    tokens: int = 0
    error: str = ""


def find_marks(service: Service, prompt: Any, phrases: tuple[str, ...], *, chat: bool) -> list[Mark]:
    """Find each phrase in the prompt. Errors are returned, not raised."""
    marks = []
    for phrase in phrases:
        try:
            marks.append(Mark(phrase, service.count_of(phrase, prompt, chat=chat)))
        except TrimtabError as error:
            marks.append(Mark(phrase, error=str(error)))
    return marks
