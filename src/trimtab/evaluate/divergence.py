"""How far a steering moves the model's output, in nats: the divergence of its next-token distributions.

For each token of the unsteered model's own answers, `KL(p_unsteered ‖ p_steered) = Σ p log(p / p_steered)` over the
vocabulary. Both distributions are computed with teacher forcing on the answer, so nothing is generated under the
steering. A norm says how hard activations are pushed; the divergence says how much of the push reaches the output, so
that methods which push in different ways can be compared at the same strength.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trimtab.engines.arguments import as_list
from trimtab.engines.contract import check_answered_prompts
from trimtab.engines.request import AnsweredPrompt
from trimtab.errors import LengthError, TrimtabError
from trimtab.evaluate.ab import evenly_spaced
from trimtab.files.steering_file import edits_digest
from trimtab.keywords import keywords
from trimtab.steering import Steering
from trimtab.text.chat import Prompt, Template

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM

TOKENS = 32
"""The number of tokens of each unsteered answer that are used."""
ARM_PROMPTS, ARM_TOKENS = 4, 16
"""The number of prompts, and of tokens of each unsteered answer, on which an evaluation's arms are measured."""
CARD_PROMPTS = 8
"""The number of prompts on which the divergence in a card is measured."""


@dataclass(frozen=True)
class Divergence:
    """`nats[i][j]` is the divergence before token `j` of answer `i`: at least 0, infinite if steered logits are NaN."""

    nats: tuple[tuple[float, ...], ...]

    @property
    def mean(self) -> float:
        """The mean over all tokens, in nats per token."""
        return float(np.mean(self._all))

    @property
    def p95(self) -> float:
        """The 95th percentile over all tokens: the divergence at the tokens that change most."""
        broken = bool(np.isinf(self._all).any())  # there is no interpolating between two infinities
        return float(np.quantile(self._all, 0.95, method="higher" if broken else "linear"))

    @property
    def tokens(self) -> int:
        return len(self._all)

    @property
    def _all(self) -> list[float]:
        return [value for row in self.nats for value in row]


@dataclass(frozen=True)
class Reference:
    """The unsteered model's answers to some prompts, and its logits before each of their tokens."""

    texts: tuple[AnsweredPrompt, ...]
    logits: tuple[Tensor, ...]


def reference(
    lm: LM,
    prompts: Prompt | Sequence[Prompt] | Reference,
    *,
    tokens: int = TOKENS,
    system: str | None = None,
    chat: bool | None = None,
    template: Template | None = None,
) -> Reference:
    """The reference that divergences are measured against: greedy answers of the unsteered model.

    It can be reused for many steerings. It holds the logits before every token: `tokens` × the vocabulary per prompt.

    Args:
        lm: A model on an engine that returns all tokens' probabilities: transformers or llamacpp.
        prompts: The prompts; or a reference, which is returned as it is.
        tokens: The maximum number of tokens of each answer.
        system: A system message before each prompt.
        chat: Whether a string is the user's message or plain text; `None` asks the tokenizer.
        template: Keywords of the chat template.

    Raises:
        TrimtabError: There are no prompts, or `tokens` is below 1.
        UnsupportedError: The engine doesn't return all tokens' probabilities.
    """
    if isinstance(prompts, Reference):
        return prompts
    lm.require("logits")
    answers = lm.generate(prompts, max_new_tokens=tokens, system=system, chat=chat, template=template)
    listed = as_list(prompts)
    if not listed:
        raise TrimtabError("there are no prompts to measure a divergence on; give at least one")
    texts = tuple(
        AnsweredPrompt(tuple(lm.encode(prompt, system=system, chat=chat, template=template)), tuple(answer.token_ids))
        for prompt, answer in zip(listed, answers, strict=True)
    )
    texts = tuple(text for text in texts if text.answer)
    if not texts:
        raise LengthError("the unsteered model's answers to these prompts are all empty; give other prompts")
    check_answered_prompts(lm.layout, texts)
    return Reference(texts, tuple(lm.answer_logits(texts)))


@keywords
def divergence(
    lm: LM,
    steering: Steering | Sequence[Steering | None] | None,
    prompts: Prompt | Sequence[Prompt] | Reference,
    *,
    tokens: int = TOKENS,
    system: str | None = None,
    chat: bool | None = None,
    template: Template | None = None,
    transfer: bool = False,
) -> Divergence:
    """How far a steering moves the model's output on these prompts.

    Args:
        lm: A model on an engine that returns all tokens' probabilities: transformers or llamacpp.
        steering: Any steering, including gated ones, those at some positions only, and edits of attention scores. Or
            one per prompt, as with steerings that emphasize a phrase of their prompt.
        prompts: The prompts, or a `reference` made from them, which then determines `tokens`, `system`, `chat` and
            `template`.
        tokens: The maximum number of tokens of each unsteered answer.
        system: A system message before each prompt.
        chat: Whether a string is the user's message or plain text; `None` asks the tokenizer.
        template: Keywords of the chat template.
        transfer: Allow a steering learned on another model of the same width.

    Returns:
        The divergence before each token, in nats.

    Raises:
        TrimtabError: A steering doesn't fit, there are no prompts, or the numbers of steerings and prompts
            differ.
        UnsupportedError: The engine can't run a steering, or doesn't return all tokens' probabilities.
    """
    steerings = [steering] if steering is None or isinstance(steering, Steering) else list(steering)
    for each_steering in steerings:
        if each_steering is not None:
            lm.check(each_steering, transfer=transfer)
    base = reference(lm, prompts, tokens=tokens, system=system, chat=chat, template=template)
    steered = lm.answer_logits(base.texts, steering)
    return Divergence(tuple(tuple(_kl(p, q)) for p, q in zip(base.logits, steered, strict=True)))


def measure_divergences(
    lm: LM, steerings: Mapping[str, Steering], prompts: Sequence[Prompt], *, transfer: bool = False
) -> dict[str, dict[str, float]]:
    """The divergence of each of these steerings from the unsteered model, on a few of an evaluation's prompts.

    Args:
        lm: The model.
        steerings: The steerings by the names of their arms.
        prompts: The evaluation's prompts.
        transfer: Allow steerings learned on another model of the same width.

    Returns:
        The `mean` and the `p95` in nats per token by name. Empty if the engine doesn't return all tokens'
        probabilities, or if nothing can be measured on these prompts.
    """
    if not steerings or not prompts or lm.supports(None, "logits") is not None:
        return {}
    try:
        base = reference(lm, evenly_spaced(prompts, ARM_PROMPTS), tokens=ARM_TOKENS)
    except LengthError:  # prompts that fill the context, or that get empty answers
        return {}
    by_name = {name: divergence(lm, steering, base, transfer=transfer) for name, steering in steerings.items()}
    return {name: {"mean": measured.mean, "p95": measured.p95} for name, measured in by_name.items()}


def with_divergence(lm: LM, steering: Steering, prompts: Sequence[Prompt]) -> Steering:
    """The steering with its divergence from the unsteered model on a few of these prompts in its card.

    Args:
        lm: The model that the steering was learned on.
        steering: The steering.
        prompts: Prompts, of which at most `CARD_PROMPTS`, evenly spaced, are used.

    Returns:
        The same edits with `card.divergence`; without it if the engine doesn't return all tokens' probabilities, or if
        nothing can be measured on these prompts.
    """
    if not prompts or lm.supports(None, "logits") is not None:
        return steering
    try:
        base = reference(lm, evenly_spaced(prompts, CARD_PROMPTS))
    except LengthError:  # prompts that fill the context, or whose answers are empty
        return steering
    measured = divergence(lm, steering, base)
    figures = {name: round(value, 6) for name in ("mean", "p95") if math.isfinite(value := getattr(measured, name))}
    recorded = {"mean": None, "p95": None, **figures, "tokens": measured.tokens, "edits": edits_digest(steering)}
    return replace(steering, card=replace(steering.card, divergence=recorded))


def _kl(unsteered: Tensor, steered: Tensor) -> list[float]:
    """The divergence per row of logits, in float64; exactly 0 for the same logits, infinite if a steered one is NaN."""
    if unsteered.isnan().any():
        raise TrimtabError("the unsteered model's logits aren't finite; load it in float32 or bfloat16")
    p, q = (logits.double().log_softmax(-1) for logits in (unsteered, steered))
    weight = p.exp()
    terms = torch.where(weight > 0, weight * (p - q), torch.zeros_like(p))
    return [math.inf if math.isnan(value) else max(0.0, value) for value in terms.sum(-1).tolist()]
