"""Which of the best candidates leaves the text whole: by its answers to questions that the verdict isn't about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from trimtab.making.candidates import Candidate
from trimtab.making.contrasts import BATCH
from trimtab.making.material import Heard
from trimtab.making.verdict import MORE_LOOPS
from trimtab.text.chat import Prompt
from trimtab.text.repetition import REPEATED_LIMIT, repeated_share

if TYPE_CHECKING:
    from trimtab.engines.transformers.generate import Generation
    from trimtab.lm import LM
    from trimtab.steering import Steering

TRIED = 3
"""So many candidates, the best ones, answer at most."""
ALLOWED = MORE_LOOPS / 2
"""By so much a candidate's share of repetitive answers may exceed that under the prompt: half of what the verdict
allows, which asks other questions."""


def first_whole(
    lm: LM, ranked: Sequence[Candidate], questions: Sequence[Heard], tokens: int, say: Callable[[str], None] | None
) -> Candidate:
    """The best candidate under which the model doesn't repeat itself more than under the prompt for what is wanted.

    A trained vector at full strength may do more than the prompt and repeat itself for it, where a weaker one does as
    much as the prompt in whole sentences. Where every candidate tried repeats itself more, the one that does so least.

    Args:
        lm: The model.
        ranked: The candidates, the best one first.
        questions: What they answer, none of the verdict's questions.
        tokens: The maximum length of an answer, in tokens.
        say: Called with what is passed over, in words.
    """
    prompts = [question.prompted for question in questions if question.prompted is not None]
    before = _repetitive(lm, prompts if len(prompts) == len(questions) else [q.bare for q in questions], None, tokens)
    shares: list[float] = []
    for candidate in ranked[:TRIED]:
        shares.append(_repetitive(lm, [question.bare for question in questions], candidate.steering, tokens))
        if shares[-1] <= before + ALLOWED:
            return candidate
        if say is not None:
            say(f"{candidate.name}: {shares[-1]:.0%} of its answers are repetitive ({before:.0%} without it)")
    return ranked[shares.index(min(shares))]


def is_repetitive(answer: Generation) -> bool:
    """Whether an answer goes in circles, or is empty."""
    return not answer.text.strip() or repeated_share(answer.text) > REPEATED_LIMIT


def _repetitive(lm: LM, prompts: Sequence[Prompt], steering: Steering | None, tokens: int) -> float:
    """The share of answers that are."""
    answers = lm.generate(list(prompts), steering, max_new_tokens=tokens, batch_size=BATCH)
    return sum(map(is_repetitive, answers)) / len(answers)
