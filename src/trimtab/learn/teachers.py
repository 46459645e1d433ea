"""Teachers: prompts to distill, made of an instruction, a system message, a text or examples."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import TrimtabError
from trimtab.text.chat import Message, Prompt

QUERY_PLACEHOLDER = "{query}"


@dataclass(frozen=True)
class Teacher:
    """A prompt around a query. The steering learned from it answers the bare query in the same way.

    Args:
        instruction: Phrasings of one instruction, which are appended to queries in turn.
        system: A system message.
        text: A text before the query, or around it, with `{query}` as the placeholder.
        examples: Earlier turns, each a query and its answer.
        times: How many times the instruction is repeated.

    Raises:
        TrimtabError: The teacher has no content, or a part of it is empty.
    """

    instruction: tuple[str, ...] = ()
    system: str | None = None
    text: str | None = None
    examples: tuple[tuple[str, str], ...] = ()
    times: int = 1

    def __post_init__(self) -> None:
        if not (self.instruction or self.examples or self.system is not None or self.text is not None):
            raise TrimtabError("a teacher needs an instruction, a system message, a text or examples")
        said = [*self.instruction, *(part for part in (self.system, self.text) if part is not None)]
        said += [side for example in self.examples for side in example]
        if not all(part.strip() for part in said):
            raise TrimtabError("a teacher's instruction, system message, text or example is empty")
        if self.times < 1:
            raise TrimtabError(f"an instruction is repeated 1 or more times, got {self.times}")

    @property
    def phrasing_count(self) -> int:
        """The number of phrasings, at least 1."""
        return max(1, len(self.instruction))

    def prompt_variants(self, phrasings: int) -> list[int]:
        """Turns with different prompts: the first `phrasings` phrasings, and then each of them repeated once more."""
        once = list(range(min(phrasings, self.phrasing_count)))
        return once + [turn + self.phrasing_count for turn in once] if self.instruction else once

    def ask(self, query: str, variant: int) -> Prompt:
        """The complete prompt for a query, except for the system message, which is passed separately.

        `variant` selects the phrasing. After all phrasings have been used, each one is repeated once more.
        """
        prompt = query
        if self.instruction:
            rounds, phrasing_index = divmod(variant, self.phrasing_count)
            prompt = " ".join([query, *[self.instruction[phrasing_index]] * (self.times + rounds)])
        if self.text is not None:
            prompt = (
                self.text.replace(QUERY_PLACEHOLDER, prompt)
                if QUERY_PLACEHOLDER in self.text
                else f"{self.text.strip()}\n\n{prompt}"
            )
        if not self.examples:
            return prompt
        messages: list[Message] = []
        for question, answer in self.examples:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": prompt}]
