"""What a model is told, so that it can be learned from: an instruction, a system message, a text, or examples."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import TrimtabError
from trimtab.text.chat import Message, Prompt

HOLE = "{query}"


@dataclass(frozen=True)
class Teacher:
    """How a query is put to the model that is learned from; what is learned answers the bare query the same way.

    Args:
        instruction: Phrasings of one instruction, which stand behind the query in turn.
        system: A system message.
        text: A text in front of the query, or around it: `{query}` in it is where the query goes.
        examples: Earlier turns, each a query and the answer that it should have.
        times: How often the instruction is said.

    Raises:
        TrimtabError: Nothing is said at all, or something is said that is empty.
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
            raise TrimtabError(f"an instruction is said once or more, got {self.times}")

    @property
    def turns(self) -> int:
        """How many different ways it has to say the same."""
        return max(1, len(self.instruction))

    def ways(self, phrasings: int) -> list[int]:
        """Turns that say it in different ways: at most so many phrasings, and then each of them once more often."""
        once = list(range(min(phrasings, self.turns)))
        return once + [turn + self.turns for turn in once] if self.instruction else once

    def ask(self, query: str, turn: int) -> Prompt:
        """The prompt with everything in it. The system message goes beside it.

        `turn` picks the phrasing; when all phrasings have had their turn, each is said once more often.
        """
        prompt = query
        if self.instruction:
            rounds, which = divmod(turn, self.turns)
            prompt = " ".join([query, *[self.instruction[which]] * (self.times + rounds)])
        if self.text is not None:
            prompt = self.text.replace(HOLE, prompt) if HOLE in self.text else f"{self.text.strip()}\n\n{prompt}"
        if not self.examples:
            return prompt
        messages: list[Message] = []
        for question, answer in self.examples:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": prompt}]
