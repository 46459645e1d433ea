"""How well an answer reads, measured without a judge: perplexity under the unsteered model, repetition, length.

A steering that is too strong breaks text in one of two ways. It becomes unlikely (the perplexity rises far above
that of unsteered answers), or it runs in circles (the perplexity falls towards 1, and n-grams come again).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.engines.contract import TOKENS_PER_BATCH, check_length, fitting
from trimtab.errors import TrimtabError
from trimtab.text.repetition import UNIT, repeated_share

if TYPE_CHECKING:
    from trimtab.engines.answer import Generation
    from trimtab.engines.language_model import LanguageModel
    from trimtab.text.chat import Prompt

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fluency:
    """What can be measured of one answer.

    `perplexity` is `perplexities`' (infinite for an empty answer); `distinct` the share of different word pairs,
    `repeated` the share of four-grams that occurred before, both 0 … 1; `tokens` the generated ids, the end-of-text
    token not counted; `empty` says that there is nothing but white space, `cut` that a token limit ended it.
    """

    perplexity: float
    distinct: float
    repeated: float
    tokens: int
    empty: bool
    cut: bool


def fluencies(
    lm: LanguageModel,
    contexts: Sequence[Prompt],
    answers: Sequence[Generation],
    *,
    system: str | None = None,
    chat: bool | None = None,
    progress: Progress | None = None,
) -> list[Fluency]:
    """The fluency of each answer; its perplexity is taken after the prompt beside it in `contexts`.

    These are rendered as `lm.generate` does it under the same `system` and `chat`.

    Raises `TrimtabError` as `perplexities` does, and `ValueError` for lists of different length.
    """
    ids = [_without_end(answer) for answer in answers]
    encoded: dict[int, list[int]] = {}  # many answers share a prompt: each is rendered once
    for context in contexts:
        if id(context) not in encoded:
            encoded[id(context)] = lm.encode(context, system=system, chat=chat)
    texts = [(encoded[id(context)], answer_ids) for context, answer_ids in zip(contexts, ids, strict=True)]
    return [
        Fluency(
            perplexity=perplexity,
            distinct=distinct_n(answer.text),
            repeated=repeated_share(answer.text),
            tokens=len(answer_ids),
            empty=not answer.text.strip(),
            cut=answer.finish_reason == "length",
        )
        for answer, answer_ids, perplexity in zip(answers, ids, perplexities(lm, texts, progress=progress), strict=True)
    ]


def distinct_n(answer: str, n: int = 2) -> float:
    """The share of different ones among the answer's `n`-grams of words, numbers and emojis; 1 if it has none."""
    words = [word.lower() for word in UNIT.findall(answer)]
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def perplexities(
    lm: LanguageModel,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> list[float]:
    """`exp` of the mean negative log-probability of each answer's tokens under the unsteered model.

    A text is `(context ids, answer ids)`; the context isn't scored. An empty context stands for the answer alone:
    the model's start token (its end token where it has none) then stands before it. Every token of the answer
    counts, so an answer of one token is the inverse of that token's probability. An answer of no tokens has
    nothing that could be predicted: its perplexity is infinite, as is that of tokens with probability 0. The
    result is at least 1 and never NaN. The same text twice is computed once.

    Memory grows with `tokens_per_batch`, and not with that times the vocabulary. `progress(done, total)` counts
    different texts.

    Raises `TrimtabError` for a text longer than the model's context, logits that aren't numbers, an empty context
    where no token can stand for the start, while the model is being steered, and for an engine without perplexities.
    """
    lm.require("perplexity")
    start = None if all(len(context) for context, _ in texts) else _start(lm)
    keys = [(tuple(context or start or ()), tuple(answer)) for context, answer in texts]
    for i, (context, answer) in enumerate(keys):
        check_length(lm.layout, len(context) + len(answer), f"text {i + 1}")
    distinct = {key for key in keys if key[1]}
    shared = len({context for context, _ in distinct}) < len(distinct)  # what has one context is read together
    waiting = sorted(distinct, key=lambda key: (0 if shared else len(key[0]) + len(key[1]), len(key[0]), key))
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    while waiting:
        rows = fitting([len(context) + len(answer) for context, answer in waiting], tokens_per_batch)
        batch, waiting = waiting[:rows], waiting[rows:]
        known |= zip(batch, lm.answer_nlls(batch), strict=True)
        if progress is not None:
            progress(len(known), len(known) + len(waiting))
    return [_exp(known[key]) if key[1] else math.inf for key in keys]


def _start(lm: LanguageModel) -> tuple[int, ...]:
    """The token with which a text begins that has nothing before it."""
    for token in (lm.bos_token_id, lm.tokenizer.eos_token_id):
        if isinstance(token, int):
            return (token,)
    raise TrimtabError(f"{lm.name} has no token for the start of a text; give a context before each answer")


def _without_end(answer: Generation) -> list[int]:
    """The answer's ids without the end-of-text token, which says nothing of how the text reads."""
    ids = list(answer.token_ids)
    return ids[:-1] if answer.finish_reason == "stop" and ids else ids


def _exp(nll: float) -> float:
    try:
        return max(1.0, math.exp(nll))  # rounding may put a certain token a hair above probability 1
    except OverflowError:
        return math.inf
