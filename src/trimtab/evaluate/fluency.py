"""How well an answer reads, measured without a judge: perplexity under the unsteered model, repetition, length.

A steering that is too strong breaks text in one of two ways. The text becomes unlikely (the perplexity rises far above
that of unsteered answers), or repetitive (the perplexity falls towards 1, and n-grams recur).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.engines.contract import TOKENS_PER_BATCH, check_length, count_fitting
from trimtab.errors import TrimtabError
from trimtab.text.repetition import UNIT, repeated_share

if TYPE_CHECKING:
    from trimtab.engines.answer import Generation
    from trimtab.engines.language_model import LanguageModel
    from trimtab.text.chat import Prompt, Template

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fluency:
    """Fluency measures of one answer.

    `perplexity` is from `perplexities` (infinite for an empty answer); `distinct` is the share of distinct word pairs,
    `repeated` the share of four-grams that occurred before, both 0 … 1; `tokens` counts the generated tokens without
    the end-of-text token; `empty` says that there is nothing but whitespace, `cut` that a token limit ended the answer.
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
    template: Template | None = None,
    progress: Progress | None = None,
) -> list[Fluency]:
    """The fluency of each answer; its perplexity is conditioned on the prompt at the same index of `contexts`.

    Prompts are rendered as in `lm.generate` with the same `system`, `chat` and `template`.

    Raises `TrimtabError` as `perplexities` does, and `ValueError` for lists of different lengths.
    """
    ids = [_without_end(answer) for answer in answers]
    encoded: dict[int, list[int]] = {}  # many answers share a prompt: each is rendered once
    for context in contexts:
        if id(context) not in encoded:
            encoded[id(context)] = lm.encode(context, system=system, chat=chat, template=template)
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
    """The share of distinct `n`-grams among the answer's words, numbers and emojis; 1 if it has none."""
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

    A text is `(context ids, answer ids)`; the context isn't scored. If the context is empty, the model's start token is
    used as context (its end token if it has no start token). Every token of the answer counts, so the perplexity of a
    one-token answer is the inverse of that token's probability. An answer without tokens has infinite perplexity, as
    has one with a token of probability 0. The result is at least 1 and never NaN. Duplicate texts are computed once.

    Memory grows with `tokens_per_batch`, but not with its product with the vocabulary size. `progress(done, total)`
    counts distinct texts.

    Raises `TrimtabError` for a text longer than the model's context, logits that are NaN, an empty context if the model
    has neither start nor end token, while the model is being steered, and for an engine without perplexities.
    """
    lm.require("perplexity")
    start = None if all(len(context) for context, _ in texts) else _start(lm)
    keys = [(tuple(context or start or ()), tuple(answer)) for context, answer in texts]
    for i, (context, answer) in enumerate(keys):
        check_length(lm.layout, len(context) + len(answer), f"text {i + 1}")
    distinct = {key for key in keys if key[1]}
    shared = len({context for context, _ in distinct}) < len(distinct)  # the same context is computed once
    pending = sorted(distinct, key=lambda key: (0 if shared else len(key[0]) + len(key[1]), len(key[0]), key))
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    while pending:
        rows = count_fitting([len(context) + len(answer) for context, answer in pending], tokens_per_batch)
        batch, pending = pending[:rows], pending[rows:]
        known |= zip(batch, lm.answer_nlls(batch), strict=True)
        if progress is not None:
            progress(len(known), len(known) + len(pending))
    return [_exp(known[key]) if key[1] else math.inf for key in keys]


def _start(lm: LanguageModel) -> tuple[int, ...]:
    """The token that precedes a text without context."""
    for token in (lm.bos_token_id, lm.tokenizer.eos_token_id):
        if isinstance(token, int):
            return (token,)
    raise TrimtabError(f"{lm.name} has no token for the start of a text; give a context before each answer")


def _without_end(answer: Generation) -> list[int]:
    """The answer's ids without the end-of-text token, which says nothing about how the text reads."""
    ids = list(answer.token_ids)
    return ids[:-1] if answer.finish_reason == "stop" and ids else ids


def _exp(nll: float) -> float:
    try:
        return max(1.0, math.exp(nll))  # rounding may give a certain token a probability slightly above 1
    except OverflowError:
        return math.inf
