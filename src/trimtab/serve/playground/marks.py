"""Phrases to emphasize, looked for in the prompt while somebody types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.serve.service import Service


@dataclass(frozen=True)
class Mark:
    """A phrase: at how many of the prompt's tokens it stands, or why not."""

    phrase: str
    tokens: int = 0
    error: str = ""


def find_marks(service: Service, prompt: Any, phrases: tuple[str, ...], *, chat: bool) -> list[Mark]:
    """Each phrase in the prompt. Nothing is raised: what isn't there is said."""
    marks = []
    for phrase in phrases:
        try:
            marks.append(Mark(phrase, service.count_of(phrase, prompt, chat=chat)))
        except TrimtabError as error:
            marks.append(Mark(phrase, error=str(error)))
    return marks
