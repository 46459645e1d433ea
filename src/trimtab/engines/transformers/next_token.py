"""Next-token probabilities of candidate tokens, for many texts under many steerings each, in few forward passes.

Rows with the same text and different steerings are identical up to the first steered token. That prefix is computed
once per text, unsteered, and its keys and values are repeated for the text's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.answer import Applied
from trimtab.engines.contract import TOKENS_PER_BATCH, count_fitting
from trimtab.engines.request import Choice, NextToken
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.compat import DynamicCache
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.prefix_cache import PrefixCache
from trimtab.engines.transformers.read import SHARE_FROM, can_share, inputs_of, padded
from trimtab.engines.transformers.session import Session
from trimtab.engines.transformers.weights import input_device
from trimtab.steering import Edit
from trimtab.steering.tensors import to_float64


def first_steered(edits: Sequence[Edit], prompt_length: int, length: int) -> int:
    """The first position at which one of these edits acts in a text of `length` tokens; `length` if none does."""
    starts = [start for edit in edits for start, _ in edit.positions.reach(prompt_length)]
    return min([*starts, length])


def in_batches(choices: Sequence[Choice], edits: Sequence[Sequence[Edit]], batch_size: int) -> Iterator[list[int]]:
    """Split the rows into batches within the token budget, with rows of the same text next to each other.

    Only the first row of a text counts with the tokens before the steering, as these are computed once per text.

    Returns:
        The indices of the rows of each batch.
    """
    lengths = [len(choice.ids) for choice in choices]
    steered = [
        length - first_steered(own, choice.prompt_length, length)
        for choice, own, length in zip(choices, edits, lengths, strict=True)
    ]
    order = sorted(range(len(choices)), key=lambda i: (-lengths[i], tuple(choices[i].ids), steered[i], i))
    while order:
        some = order[:batch_size]
        texts = [tuple(choices[i].ids) for i in some]
        anew = [not n or texts[n] != texts[n - 1] for n in range(len(some))]
        read = count_fitting([lengths[i] for i, first in zip(some, anew, strict=True) if first], TOKENS_PER_BATCH)
        tokens = [lengths[i] if first else steered[i] for i, first in zip(some, anew, strict=True)]
        within = [
            total <= TOKENS_PER_BATCH and of <= read
            for total, of in zip(accumulate(tokens), accumulate(anew), strict=True)
        ]
        rows = max(1, sum(within))
        yield order[:rows]
        order = order[rows:]


@torch.no_grad()
def next_tokens(
    model: Any,
    layout: Layout,
    choices: Sequence[Choice],
    session: Session,
    edits: Sequence[tuple[Edit, ...]],
    prefix_cache: PrefixCache | None = None,
) -> list[NextToken]:
    """The next-token results of one batch of rows, in order, each under its own edits.

    Args:
        model: The whole model.
        layout: Its layout.
        choices: The text and the candidate tokens of each row.
        session: The session that steers the batch; it decides on the same `edits`.
        edits: The edits of each row.
        prefix_cache: Supplies the keys and values of the tokens before the first steered one.
    """
    sites = sorted({edit.site for row_edits in edits for edit in row_edits})
    texts: dict[tuple[int, ...], int] = {}
    of = [texts.setdefault(tuple(choice.ids), len(texts)) for choice in choices]
    tail = max(
        max(1, len(choice.ids) - first_steered(row_edits, choice.prompt_length, len(choice.ids)))
        for choice, row_edits in zip(choices, edits, strict=True)
    )
    device = input_device(model)
    shortest = min(len(text) for text in texts) - tail
    lengths = [choice.prompt_length for choice in choices]
    prompts = [choice.ids[: choice.prompt_length] for choice in choices]
    session.expect(lengths, prompts=prompts)
    if prefix_cache is not None and shortest > 0 and prefix_cache.usable_for([text[:-tail] for text in texts]):
        cache, mask = prefix_cache.cache_for([tuple(choice.ids[:-tail]) for choice in choices])
        mask = torch.cat([mask, mask.new_ones(len(choices), tail)], 1)
        ids = torch.tensor([list(choice.ids[-tail:]) for choice in choices], device=device)
        session.expect(lengths, resumed=True, prompts=prompts)
    elif len(texts) < len(choices) and shortest >= SHARE_FROM and can_share(layout):
        cache = DynamicCache(config=layout.decoder.config)  # type: ignore[arg-type]
        ids, mask = padded([text[:-tail] for text in texts], left=True, device=device)
        _run(layout.decoder, ids, mask, cache)
        cache.batch_select_indices(torch.tensor(of, device=device))
        mask = torch.cat([mask[of], mask.new_ones(len(choices), tail)], 1)
        ids = torch.tensor([list(choice.ids[-tail:]) for choice in choices], device=device)
        session.expect(lengths, resumed=True, prompts=prompts)
    else:
        cache = None
        ids, mask = padded([choice.ids for choice in choices], left=True, device=device)
    with session.hooked(sites):
        logits = _run(model, ids, mask, cache).logits[:, -1]
        session.check_reached(mask.shape[1])
    logprobs = to_float64(logits).log_softmax(-1)
    return [
        NextToken(
            tuple(logprobs[row, list(choice.candidates)].tolist()),
            Applied(tuple(str(edit) for edit in edits[row]), session.doses(row) if sites else ()),
        )
        for row, choice in enumerate(choices)
    ]


def _run(module: Callable[..., Any], ids: Tensor, mask: Tensor, cache: DynamicCache | None) -> Any:
    """A forward pass over ids, with logits for the last column only. The mask also covers the tokens in the cache."""
    keep = {"logits_to_keep": 1} if "logits_to_keep" in compat.parameters(module) else {}
    return module(**inputs_of(module, ids, mask, cache), **keep)
