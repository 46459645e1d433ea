"""Teacher forcing: the logits before each token of given answers, each under its own edits, in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.request import AnsweredPrompt
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.attention import steered_request_scores
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.likelihood import MAX_LOGITS
from trimtab.engines.transformers.next_token import first_steered
from trimtab.engines.transformers.prefix_cache import PrefixCache
from trimtab.engines.transformers.read import inputs_of, padded
from trimtab.engines.transformers.scores import activation_edits, is_score_edit, score_edits
from trimtab.engines.transformers.session import Session
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import TrimtabError
from trimtab.steering import Edit, Steering


def in_batches(
    texts: Sequence[AnsweredPrompt], steerings: Sequence[Steering | None], vocabulary: int
) -> Iterator[list[int]]:
    """Indices of texts to read together: as many of similar length as `MAX_LOGITS` allows, padded to the longest.

    If a steering edits attention scores, the texts of a batch have the same lengths.
    """
    same_length = any(is_score_edit(edit) for steering in steerings if steering is not None for edit in steering.edits)
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i].prompt), len(texts[i].answer), i))
    while order:
        chosen = _batch(texts, order, MAX_LOGITS // vocabulary, same_length)
        order = order[len(chosen) :]
        yield chosen


def _batch(texts: Sequence[AnsweredPrompt], order: Sequence[int], tokens: int, same_length: bool) -> list[int]:
    """The leading part of `order` whose answers fit into `tokens` when padded to the longest; at least one."""
    chosen = [order[0]]
    for i in order[1:]:
        longest = max(len(texts[n].answer) for n in [*chosen, i]) + 1
        lengths = {(len(texts[n].prompt), len(texts[n].answer)) for n in [*chosen, i]}
        if longest * (len(chosen) + 1) > tokens or (same_length and len(lengths) > 1):
            break
        chosen.append(i)
    return chosen


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
