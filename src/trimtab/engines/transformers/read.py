"""Reading activations: nothing is computed that isn't read.

A pass stops at the deepest requested site and never reaches the language-model head; texts are cut after the
last requested position, sorted by length into batches of a bounded number of tokens, and what texts begin with
runs once: what all of them have in common (a chat template's system prompt, say), then what the texts of a group
have (the two members of a contrastive pair). Of the activations only the requested positions are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.engines.contract import TOKENS_PER_BATCH, check_texts
from trimtab.engines.request import Batch, Text
from trimtab.engines.resolve import Read, Where
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.anatomy import positions_of
from trimtab.engines.transformers.compat import DynamicCache
from trimtab.engines.transformers.exclusive import reading
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.places import attach, place
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Site

if TYPE_CHECKING:
    from trimtab.engines.transformers.session import FirstPass

SHARE_FROM = 8  # a shared beginning shorter than this isn't worth a pass of its own


@dataclass(frozen=True)
class _Opening:
    """What all texts begin with, already run: the number of tokens, and their keys and values in one row."""

    length: int
    cache: DynamicCache


class _Enough(BaseException):
    """Raised by the deepest hook: all that is needed has been computed. Only ever in the thread that reads."""


@torch.no_grad()
def read_groups(
    layout: Layout,
    groups: Sequence[Sequence[Text]],
    sites: Sequence[Site],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Iterator[Batch]:
    """Read every text of every group at every site, batch by batch, in order of length.

    A batch holds groups of equally many members, and at most `tokens_per_batch` tokens (or one group).
    Raises `TrimtabError` for an unknown layer, an empty text or one longer than the model's context.
    """
    check_sites(layout, sites)
    check_texts(layout, groups)
    cut = [[Text(t.ids[: max(t.positions) + 1], t.positions) for t in group] for group in groups]
    share = can_share(layout)
    shared = [_shared_length(group) if share else 0 for group in cut]
    opening = _run_opening(layout, [group for group, n in zip(cut, shared, strict=True) if n], sites)
    # the cost of a group, in tokens; batches are made of neighbours in this order
    order = sorted(range(len(cut)), key=lambda g: (len(cut[g]), shared[g] > 0, max(len(t.ids) for t in cut[g]), g))
    for chosen in _batches(order, cut, shared, tokens_per_batch):
        prefix = [shared[g] for g in chosen]
        if all(prefix):
            yield Batch(chosen, _read_shared(layout, [cut[g] for g in chosen], prefix, opening, sites))
        else:
            yield Batch(chosen, _read_plain(layout, [cut[g] for g in chosen], sites))


def check_sites(layout: Layout, sites: Sequence[Site]) -> None:
    """Raises `TrimtabError` for a site that the model doesn't have."""
    for site in sites:
        if site.kind == "scores":
            raise UnsupportedError("attention scores are steered, not read; read the residual stream")
        place(layout, site)


def reader(layout: Layout, prompts: Sequence[Sequence[int]]) -> Read:
    """Reads prompts, given by their token ids, by passes of their own."""

    def read(where: Where, sites: Sequence[Site], tokens: int) -> dict[int, dict[Site, Tensor]]:
        numbers = list(where)
        groups = [[Text(prompts[i], where[i])] for i in numbers]
        activations: dict[int, dict[Site, Tensor]] = {}
        for batch in read_groups(layout, groups, sites, tokens_per_batch=tokens):
            for n, g in enumerate(batch.groups):
                activations[numbers[g]] = {site: batch.values[site][n][0] for site in sites}
        return activations

    return read


def reader_of_pass(layout: Layout, count: int, lengths: Sequence[int] | None, first: FirstPass) -> Read:
    """Reads the prompts of so many requests, of these lengths, by a pass like the first one over them."""

    def read(where: Where, sites: Sequence[Site], _tokens: int) -> dict[int, dict[Site, Tensor]]:
        activations = run_decoder(layout, {**compat.without_cache(first.inputs), "use_cache": False}, sites)
        repeat = len(first.lengths) // count
        by_request = {}
        for request, positions in where.items():
            row = request * repeat
            if lengths is not None and first.lengths[row] != lengths[request]:
                raise TrimtabError("a gate or mask can't be decided from a part of the prompt; prefill it in one pass")
            stop = first.last[row] + 1
            columns = [stop - first.lengths[row] + position for position in positions]
            by_request[request] = {site: x[row, columns] for site, x in activations.items()}
        return by_request

    return read


def _batches(order: list[int], cut: list, shared: list[int], budget: int) -> Iterator[list[int]]:
    chosen: list[int] = []
    widest = 0
    for g in order:
        size = max(len(text.ids) for text in cut[g])
        alike = not chosen or (len(cut[g]) == len(cut[chosen[0]]) and bool(shared[g]) == bool(shared[chosen[0]]))
        rows = 1 if shared[g] else len(cut[g])
        if chosen and (not alike or max(widest, size) * rows * (len(chosen) + 1) > budget):
            yield chosen
            chosen, widest = [], 0
        chosen.append(g)
        widest = max(widest, size)
    if chosen:
        yield chosen


def _shared_length(group: Sequence[Text]) -> int:
    """How many tokens all members begin with, leaving each at least one of its own; 0 if not worth a pass."""
    same = _common(group) if len(group) > 1 else 0
    return same if same >= SHARE_FROM else 0


def _common(texts: Sequence[Text]) -> int:
    """How many tokens all these texts begin with, leaving each at least one of its own."""
    longest = min(len(text.ids) for text in texts) - 1
    first = texts[0].ids
    return next((i for i in range(longest) if any(t.ids[i] != first[i] for t in texts)), longest)


def can_share(layout: Layout) -> bool:
    """Whether rows of the model's cache can be repeated, with pads between what they share and what they don't.

    It is one of plain keys and values, and the model takes its tokens' positions as they are given.
    """
    if not positions_of(layout).takes_positions:
        return False
    try:
        return compat.keeps_plain_cache(layout.decoder)
    except UnsupportedError:  # it takes no cache that is known
        return False


def inputs_of(module: Any, ids: Tensor, mask: Tensor, cache: DynamicCache | None) -> dict[str, Any]:
    """What a pass over ids `[rows, tokens]` is given, of which the mask covers those in the cache as well."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": cache is not None}
    if cache is not None:
        inputs = compat.with_cache(module, inputs, cache)
    if "position_ids" in compat.parameters(module):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return inputs


def _run_opening(layout: Layout, groups: list[list[Text]], sites: Sequence[Site]) -> _Opening:
    """Run what all texts of these groups begin with, up to the first position that is read.

    Pads may come after it, so the model must take positions as they are given, and no window may count columns.
    """
    cache = DynamicCache(config=layout.decoder.config)  # type: ignore[arg-type]
    texts = [text for group in groups for text in group]
    plain = compat.grows_plainly(cache) and positions_of(layout).takes_positions
    if len(groups) < 2 or not plain:
        return _Opening(0, cache)
    read_from = min(min(text.positions) for text in texts)
    # each group keeps a token of its own, after what all have and before its members part
    length = min(_common(texts), read_from, *(_common(group) - 1 for group in groups))
    if length < SHARE_FROM:
        return _Opening(0, cache)
    ids, mask = padded([texts[0].ids[:length]], left=False, device=_device(layout))
    _run(layout, ids, mask, sites, ([], []), cache)
    return _Opening(length, cache)


def _read_plain(layout: Layout, groups: list[list[Text]], sites: Sequence[Site]) -> dict[Site, list[list[Tensor]]]:
    texts = [text for group in groups for text in group]
    ids, mask = padded([text.ids for text in texts], left=False, device=_device(layout))
    rows = [row for row, text in enumerate(texts) for _ in text.positions]
    columns = [position for text in texts for position in text.positions]
    activations = _run(layout, ids, mask, sites, (rows, columns))
    return {site: _regroup(x, groups) for site, x in activations.items()}


def _read_shared(
    layout: Layout, groups: list[list[Text]], prefix: list[int], opening: _Opening, sites: Sequence[Site]
) -> dict[Site, list[list[Tensor]]]:
    """The columns are: the opening, pads, a row for each group of what its members share; then each member's tail."""
    members = len(groups[0])
    device = _device(layout)
    texts = [text for group in groups for text in group]
    starts = [n for n in prefix for _ in range(members)]
    heads = [group[0].ids[opening.length : n] for group, n in zip(groups, prefix, strict=True)]
    ids, mask = padded(heads, left=True, device=device)
    head_mask = torch.cat([mask.new_ones(len(groups), opening.length), mask], 1)
    tails, mask = padded([t.ids[n:] for t, n in zip(texts, starts, strict=True)], left=False, device=device)
    tail_mask = torch.cat([head_mask.repeat_interleave(members, 0), mask], 1)

    places = [(row, p, p - starts[row]) for row, text in enumerate(texts) for p in text.positions]
    in_head = [(row // members, ids.shape[1] + after) for row, _, after in places if after < 0]
    in_tail = [(row, after) for row, _, after in places if after >= 0]
    cache = copy.deepcopy(opening.cache)
    cache.batch_repeat_interleave(len(groups))
    head = _run(layout, ids, head_mask, sites, _unzip(in_head), cache)
    cache.batch_repeat_interleave(members)
    tail = _run(layout, tails, tail_mask, sites, _unzip(in_tail), cache)
    order = sorted(range(len(places)), key=lambda i: places[i][2] >= 0)  # heads first, as they are put together
    back = torch.tensor(order).argsort()
    return {site: _regroup(torch.cat([head[site], tail[site]])[back.to(head[site].device)], groups) for site in sites}


def _unzip(places: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [row for row, _ in places], [column for _, column in places]


def _regroup(values: Tensor, groups: list[list[Text]]) -> list[list[Tensor]]:
    each = iter(values.split([len(text.positions) for group in groups for text in group]))
    return [[next(each) for _ in group] for group in groups]


def padded(sequences: Sequence[Sequence[int]], left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask `[rows, columns]` of texts of different lengths, padded on the left or on the right."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        where = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, where] = torch.tensor(list(sequence), dtype=torch.long)
        mask[row, where] = 1
    return ids.to(device), mask.to(device)


def _run(
    layout: Layout,
    ids: Tensor,
    mask: Tensor,
    sites: Sequence[Site],
    at: tuple[list[int], list[int]],
    cache: DynamicCache | None = None,
) -> dict[Site, Tensor]:
    """The activations `[places, width]` at each site, at these rows and columns of the batch."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": cache is not None}
    if cache is not None:
        inputs = compat.with_cache(layout.decoder, inputs, cache)
    if positions_of(layout).takes_positions:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    rows, columns = (torch.tensor(indices, dtype=torch.long, device=ids.device) for indices in at)
    return run_decoder(layout, inputs, sites, lambda x: x[rows.to(x.device), columns.to(x.device)])


def run_decoder(
    layout: Layout, inputs: dict[str, Any], sites: Sequence[Site], keep: Callable[[Tensor], Tensor] = lambda x: x
) -> dict[Site, Tensor]:
    """What `keep` makes of the activations `[rows, tokens, width]` at `sites`, for these inputs of the decoder."""
    with recording(layout, sites, keep) as activations:
        with suppress(_Enough):
            layout.decoder(**inputs)
    check_read(sites, activations)
    return activations


def check_read(sites: Sequence[Site], activations: Mapping[Site, Any]) -> None:
    """Raises `TrimtabError` unless something was read at every site."""
    if missing := sorted(set(sites) - set(activations)):
        raise TrimtabError(
            f"the part of the model at {missing[0]} didn't run in a pass that reads there; something runs the model"
            " past its hooks (a captured graph, a replaced forward)"
        )


@contextmanager
def recording(
    layout: Layout, sites: Sequence[Site], keep: Callable[[Tensor], Tensor], *, to_the_end: bool = False
) -> Iterator[dict[Site, Tensor]]:
    """Hooks that record what `keep` makes of the activations at `sites`, and end the pass when all are there.

    `to_the_end` lets it go on. Passes of other threads are left alone, and other runs wait until this one is done.
    """
    activations: dict[Site, Tensor] = {}
    owner = get_ident()
    wanted = sorted(set(sites))
    places = {site: place(layout, site) for site in wanted}
    rows = tokens = 0

    def begin(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal rows, tokens
        if get_ident() != owner:
            return
        inputs = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        rows, tokens = next(tensor for tensor in inputs if isinstance(tensor, Tensor)).shape[:2]

    def record(site: Site, tensor: Tensor) -> None:
        if get_ident() != owner:
            return
        x = places[site].read(tensor)
        # some blocks run their MLP over the tokens of all rows as one list
        whole = x if x.dim() == 3 else x.reshape(rows, -1, x.shape[-1])
        if whole.shape[:2] != (rows, tokens):
            raise UnsupportedError(
                f"at {site} the model computes {tuple(x.shape)} in a pass of {rows} rows and {tokens} tokens; which is"
                " whose can't be told"
            )
        activations[site] = keep(whole)
        if len(activations) == len(wanted) and not to_the_end:
            raise _Enough

    with reading(layout.decoder), ExitStack() as hooks:
        hooks.enter_context(layout.decoder.register_forward_pre_hook(begin, with_kwargs=True))
        for site in wanted:
            hooks.callback(attach(replace(places[site], streams=None), partial(record, site)).remove)
        yield activations


def _device(layout: Layout) -> torch.device:
    return input_device(layout.decoder)
