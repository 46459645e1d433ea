"""Teacher forcing: the logits before each token of given answers, each under its own edits, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.contract import check_length
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.attention import steered_request_scores
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.next_token import first_steered
from trimtab.engines.transformers.prefix_cache import PrefixCache
from trimtab.engines.transformers.read import inputs_of, padded
from trimtab.engines.transformers.scores import activation_edits, score_edits
from trimtab.engines.transformers.session import Session
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import TrimtabError
from trimtab.steering import Edit


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt and its answer, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def check_answered_prompts(layout: Layout, texts: Sequence[AnsweredPrompt]) -> None:
    """Raise `TrimtabError`, naming the text, if one has no prompt or answer or is too long."""
    for i, text in enumerate(texts):
        if not text.prompt or not text.answer:
            raise TrimtabError(f"text {i + 1} has no {'answer' if text.prompt else 'prompt'} to read")
        check_length(layout, len(text.prompt) + len(text.answer), f"text {i + 1}")


@torch.no_grad()
def teacher_forced(
    model: Any,
    layout: Layout,
    texts: Sequence[AnsweredPrompt],
    session: Session,
    edits: Sequence[tuple[Edit, ...]],
    prefix_cache: PrefixCache | None = None,
) -> list[Tensor]:
    """The logits `[answer tokens, vocabulary]` before each token of each answer, in one pass.

    Args:
        model: The whole model.
        layout: Its layout.
        texts: The texts, which are left-padded.
        session: The session that steers them. It decides on the same edits, without those of attention scores.
        edits: The edits of each text. If they steer attention scores, all prompts must have the same length, and all
            answers.
        prefix_cache: Supplies the keys and values of tokens before the first steered one; default: no cache.

    Raises:
        TrimtabError: Attention scores are steered in texts of different lengths, or the pass bypassed the hooks.
    """
    residual = [activation_edits(row_edits) for row_edits in edits]
    scores = [score_edits(row_edits) for row_edits in edits]
    lengths = [len(text.prompt) for text in texts]
    if any(scores) and len({(len(text.prompt), len(text.answer)) for text in texts}) > 1:
        raise TrimtabError("texts with steered attention scores must all have the same length within a batch")
    sites = sorted({edit.site for row_edits in residual for edit in row_edits})
    device = input_device(model)
    whole = [(*text.prompt, *text.answer) for text in texts]
    longest = max(len(text.answer) for text in texts)
    reach = [len(ids) - first_steered(own, n, len(ids)) for ids, own, n in zip(whole, edits, lengths, strict=True)]
    tail = max(longest + 1, *reach)
    inputs: dict[str, Any]
    going_on = prefix_cache is not None and not any(scores) and prefix_cache.usable_for([ids[:-tail] for ids in whole])
    if prefix_cache is not None and going_on:
        cache, before = prefix_cache.cache_for([ids[:-tail] for ids in whole])
        mask = torch.cat([before, before.new_ones(len(texts), tail)], 1)
        inputs = inputs_of(model, torch.tensor([ids[-tail:] for ids in whole], device=device), mask, cache)
    else:
        padded_ids, mask = padded(whole, left=True, device=device)
        inputs = inputs_of(model, padded_ids, mask, None)
    if "logits_to_keep" in compat.parameters(model):
        inputs["logits_to_keep"] = longest + 1
    session.expect(lengths, resumed=going_on, prompts=[text.prompt for text in texts])
    with steered_request_scores(layout, scores, lengths), session.hooked(sites):
        logits = model(**inputs).logits
        session.check_reached(mask.shape[1])
    return [logits[row, -len(text.answer) - 1 : -1] for row, text in enumerate(texts)]
