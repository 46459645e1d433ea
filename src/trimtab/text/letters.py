"""Multiple-choice questions, and answers such as `(A)`, as token ids, for any tokenizer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError
from trimtab.text.chat import Prompt, encode, has_template

if TYPE_CHECKING:
    from trimtab.text.pairs import Pair

ANSWER = re.compile(r"\(([A-Z])\)")
BASE_FORMAT = "Input: {question}\nResponse:"
"""The prompt for a model without a chat template (the paper's format for base models)."""


def letter_of(answer: str) -> str:
    """`"A"` for `"(A)"`. Raises `TrimtabError` for anything else."""
    match = ANSWER.fullmatch(answer.strip())
    if match is None:
        raise TrimtabError(f"the answer {answer!r} isn't a bracketed letter such as (A)")
    return match[1]


@dataclass(frozen=True)
class LetterQuestion:
    """A multiple-choice question as token ids.

    `prompt` ends where the answer begins, so that its last token is the last prompt token; `opening` is the bracket
    after it. `letters` has each letter's token, `closing` the tokens after the letter.
    """

    prompt: tuple[int, ...]
    opening: tuple[int, ...]
    letters: Mapping[str, int]
    closing: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        """The input for scoring the letter: the prompt and the opening bracket."""
        return [*self.prompt, *self.opening]

    def ids_with_answer(self, letter: str) -> list[int]:
        """The prompt and the whole answer `(A)`; its letter is at position `len(self.ids)`."""
        return [*self.ids, self.letters[letter], *self.closing]


def question_prompt(tokenizer: Any, question: str, system: str | None = None) -> Prompt:
    """The question as a chat model's message, or in the base format if there is no chat template.

    Raises `TrimtabError` for a system message without a template.
    """
    if not has_template(tokenizer):
        if system is not None:
            raise TrimtabError("a system message needs a chat template, but this tokenizer has none")
        return BASE_FORMAT.format(question=question)
    if system is None:
        return question
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def letter_question(
    tokenizer: Any, question: str, letters: Sequence[str], *, system: str | None = None
) -> LetterQuestion:
    """A question and the letters that answer it, concatenated as ids, so that learning and scoring use the same ids.

    Raises `TrimtabError` as `question_prompt` and `answer_ids` do.
    """
    return letter_question_from_prompt(tokenizer, question_prompt(tokenizer, question, system), letters)


def letter_question_from_prompt(tokenizer: Any, prompt: Prompt, letters: Sequence[str]) -> LetterQuestion:
    """`letter_question` for a prompt from `question_prompt`."""
    by_letter = {letter: answer_ids(tokenizer, letter, after_space=not has_template(tokenizer)) for letter in letters}
    opening, _, closing = next(iter(by_letter.values()))
    return LetterQuestion(
        prompt=tuple(encode(tokenizer, prompt)),
        opening=tuple(opening),
        letters={letter: token for letter, (_, token, _) in by_letter.items()},
        closing=tuple(closing),
    )


def answer_ids(tokenizer: Any, letter: str, *, after_space: bool = False) -> tuple[list[int], int, list[int]]:
    """The ids of `(`, of the letter, and of `)`; the letter is a single token, the same in any context.

    Tokenizers may merge the bracket and the letter (Qwen2.5's do after a newline). Then the token at the letter's
    position would not be a letter, and a scoring prompt that ends with `(` would be tokenized unlike anything in the
    training data. In that case the parts are concatenated as ids. `after_space` uses the bracket that follows a space.

    Raises `TrimtabError` if the letter isn't a single token.
    """
    opening = " (" if after_space else "("
    whole = ids_of(tokenizer, f"{opening}{letter})")
    positions = [i for i, token in enumerate(whole) if tokenizer.decode([token]).strip() == letter]
    if len(positions) == 1:
        return whole[: positions[0]], whole[positions[0]], whole[positions[0] + 1 :]
    alone = ids_of(tokenizer, letter)
    if len(alone) != 1:
        raise TrimtabError(f"{letter!r} is {len(alone)} tokens in this tokenizer, so letter answers can't be read")
    return ids_of(tokenizer, opening), alone[0], ids_of(tokenizer, ")")


def letter_balance(pairs: Sequence[Pair]) -> dict[str, float]:
    """How much more often each letter is the positive answer than the negative one, per pair: -1 to 1, 0 is balanced.

    The mean difference contains the letters' own directions with exactly these weights.
    """
    net: Counter[str] = Counter()
    for pair in pairs:
        net[letter_of(str(pair.positive))] += 1
        net[letter_of(str(pair.negative))] -= 1
    return {letter: net[letter] / len(pairs) for letter in sorted(net)}


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without special tokens at its beginning or end."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
