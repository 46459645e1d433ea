"""Read activations, computing only what is requested.

A pass stops at the deepest requested site and never runs the language-model head. Texts are cut after the last
requested position and sorted by length into batches of a limited number of tokens. Shared prefixes run once: first the
prefix of all texts (such as the chat template's system prompt), then that of each group (the two sides of a contrastive
pair). Only the activations at the requested positions are kept.
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
from trimtab.engines.resolve import PositionsByRequest, ReadActivations
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.anatomy import position_handling
from trimtab.engines.transformers.compat import DynamicCache
from trimtab.engines.transformers.exclusive import reading
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.places import attach, place
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Site

if TYPE_CHECKING:
    from trimtab.engines.transformers.session import FirstPass

SHARE_FROM = 8  # a shared prefix shorter than this isn't worth a separate pass


@dataclass(frozen=True)
class _SharedPrefix:
    """The prefix that all texts share, already computed: the number of tokens, and a one-row KV cache."""

    length: int
    cache: DynamicCache


class _PassComplete(BaseException):
    """Raised by the last hook to end the pass, in the reading thread only: all requested activations are computed."""


@torch.no_grad()
def read_groups(
    layout: Layout,
    groups: Sequence[Sequence[Text]],
    sites: Sequence[Site],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Iterator[Batch]:
    """Read all texts of all groups at all sites, in batches by length.

    The groups in a batch have the same number of texts. A batch has at most `tokens_per_batch` tokens, or one group.

    Raises:
        TrimtabError: A layer doesn't exist, or a text is empty or longer than the model's context.
    """
    check_sites(layout, sites)
    check_texts(layout, groups)
    cut = [[Text(t.ids[: max(t.positions) + 1], t.positions) for t in group] for group in groups]
    share = can_share(layout)
    shared = [_shared_length(group) if share else 0 for group in cut]
    opening = _compute_shared_prefix(layout, [group for group, n in zip(cut, shared, strict=True) if n], sites)
    # batches are consecutive groups in this order: alike, and of similar length
    order = sorted(range(len(cut)), key=lambda g: (len(cut[g]), shared[g] > 0, max(len(t.ids) for t in cut[g]), g))
    for chosen in _batches(order, cut, shared, tokens_per_batch):
        prefix = [shared[g] for g in chosen]
        if all(prefix):
            yield Batch(chosen, _read_shared(layout, [cut[g] for g in chosen], prefix, opening, sites))
        else:
            yield Batch(chosen, _read_plain(layout, [cut[g] for g in chosen], sites))


def check_sites(layout: Layout, sites: Sequence[Site]) -> None:
    """Raise `TrimtabError` if the model doesn't have one of the sites."""
    for site in sites:
        if site.kind == "scores":
            raise UnsupportedError("attention scores are steered, not read; read the residual stream")
        place(layout, site)


def reader(layout: Layout, prompts: Sequence[Sequence[int]]) -> ReadActivations:
    """A function that reads the activations of prompts, given as token ids, in separate passes."""

    def read(where: PositionsByRequest, sites: Sequence[Site], tokens: int) -> dict[int, dict[Site, Tensor]]:
        numbers = list(where)
        groups = [[Text(prompts[i], where[i])] for i in numbers]
        activations: dict[int, dict[Site, Tensor]] = {}
        for batch in read_groups(layout, groups, sites, tokens_per_batch=tokens):
            for n, g in enumerate(batch.groups):
                activations[numbers[g]] = {site: batch.values[site][n][0] for site in sites}
        return activations

    return read


def reader_of_pass(layout: Layout, count: int, lengths: Sequence[int] | None, first: FirstPass) -> ReadActivations:
    """A function that reads the activations of prompts in a pass with the same inputs as the first pass over them.

    Args:
        layout: The model's layout.
        count: The number of requests.
        lengths: The prompt lengths, if known; the first pass must then be over whole prompts.
        first: The first pass.
    """

    def read(where: PositionsByRequest, sites: Sequence[Site], _tokens: int) -> dict[int, dict[Site, Tensor]]:
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
    """The length of the prefix that all texts share, leaving at least one token of each; 0 if not worth a pass."""
    same = _common_length(group) if len(group) > 1 else 0
    return same if same >= SHARE_FROM else 0


def _common_length(texts: Sequence[Text]) -> int:
    """The length of the prefix that all texts share, leaving at least one token of each."""
    longest = min(len(text.ids) for text in texts) - 1
    first = texts[0].ids
    return next((i for i in range(longest) if any(t.ids[i] != first[i] for t in texts)), longest)


def can_share(layout: Layout) -> bool:
    """Whether rows of the model's cache can be repeated, with padding between a shared prefix and the rest.

    It requires a cache of plain keys and values, and a model that uses the position ids that it is given.
    """
    if not position_handling(layout).takes_positions:
        return False
    try:
        return compat.keeps_plain_cache(layout.decoder)
    except UnsupportedError:  # it takes no known type of cache
        return False


def inputs_of(module: Any, ids: Tensor, mask: Tensor, cache: DynamicCache | None) -> dict[str, Any]:
    """The inputs of a pass over ids `[rows, tokens]`. The mask also covers the tokens in the cache."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": cache is not None}
    if cache is not None:
        inputs = compat.with_cache(module, inputs, cache)
    if "position_ids" in compat.parameters(module):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return inputs


def _compute_shared_prefix(layout: Layout, groups: list[list[Text]], sites: Sequence[Site]) -> _SharedPrefix:
    """Compute the prefix that all texts of these groups share, up to the first position that is read.

    Padding may follow it, so the model must use the given position ids, and its cache must have no sliding windows.
    """
    cache = DynamicCache(config=layout.decoder.config)  # type: ignore[arg-type]
    texts = [text for group in groups for text in group]
    plain = compat.grows_plainly(cache) and position_handling(layout).takes_positions
    if len(groups) < 2 or not plain:
        return _SharedPrefix(0, cache)
    read_from = min(min(text.positions) for text in texts)
    # leaves at least one token between this prefix and the end of each group's shared prefix
    length = min(_common_length(texts), read_from, *(_common_length(group) - 1 for group in groups))
    if length < SHARE_FROM:
        return _SharedPrefix(0, cache)
    ids, mask = padded([texts[0].ids[:length]], left=False, device=_device(layout))
    _run(layout, ids, mask, sites, ([], []), cache)
    return _SharedPrefix(length, cache)


def _read_plain(layout: Layout, groups: list[list[Text]], sites: Sequence[Site]) -> dict[Site, list[list[Tensor]]]:
    texts = [text for group in groups for text in group]
    ids, mask = padded([text.ids for text in texts], left=False, device=_device(layout))
    rows = [row for row, text in enumerate(texts) for _ in text.positions]
    columns = [position for text in texts for position in text.positions]
    activations = _run(layout, ids, mask, sites, (rows, columns))
    return {site: _regroup(x, groups) for site, x in activations.items()}


def _read_shared(
    layout: Layout, groups: list[list[Text]], prefix: list[int], opening: _SharedPrefix, sites: Sequence[Site]
) -> dict[Site, list[list[Tensor]]]:
    """Read groups with a shared prefix. Columns: the opening, padding and the group's prefix; then each text's tail."""
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
    order = sorted(range(len(places)), key=lambda i: places[i][2] >= 0)  # heads first, as in the concatenation below
    back = torch.tensor(order).argsort()
    return {site: _regroup(torch.cat([head[site], tail[site]])[back.to(head[site].device)], groups) for site in sites}


def _unzip(places: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [row for row, _ in places], [column for _, column in places]


def _regroup(values: Tensor, groups: list[list[Text]]) -> list[list[Tensor]]:
    each = iter(values.split([len(text.positions) for group in groups for text in group]))
    return [[next(each) for _ in group] for group in groups]


def padded(sequences: Sequence[Sequence[int]], left: bool, device: torch.device, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask `[rows, columns]` of texts of different lengths, padded on the left or the right."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad)
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
    if position_handling(layout).takes_positions:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    rows, columns = (torch.tensor(indices, dtype=torch.long, device=ids.device) for indices in at)
    return run_decoder(layout, inputs, sites, lambda x: x[rows.to(x.device), columns.to(x.device)])


def run_decoder(
    layout: Layout, inputs: dict[str, Any], sites: Sequence[Site], keep: Callable[[Tensor], Tensor] = lambda x: x
) -> dict[Site, Tensor]:
    """Run the decoder and return the result of `keep` on the activations `[rows, tokens, width]` at each site."""
    with recording(layout, sites, keep) as activations:
        with suppress(_PassComplete):
            layout.decoder(**inputs)
    check_read(sites, activations)
    return activations


def check_read(sites: Sequence[Site], activations: Mapping[Site, Any]) -> None:
    """Raise `TrimtabError` unless activations were read at every site."""
    if missing := sorted(set(sites) - set(activations)):
        raise TrimtabError(
            f"the part of the model at {missing[0]} didn't run in a pass that reads there; something bypasses the"
            " model's hooks (a captured graph, a replaced forward)"
        )


@contextmanager
def recording(
    layout: Layout, sites: Sequence[Site], keep: Callable[[Tensor], Tensor], *, to_the_end: bool = False
) -> Iterator[dict[Site, Tensor]]:
    """Record the result of `keep` on the activations at `sites`, and end the pass when all are recorded.

    With `to_the_end` the pass continues. Passes of other threads aren't recorded, and other runs wait for this one.
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
                f"at {site} the model computes {tuple(x.shape)} in a pass of {rows} rows and {tokens} tokens; which"
                " belongs to which can't be determined"
            )
        activations[site] = keep(whole)
        if len(activations) == len(wanted) and not to_the_end:
            raise _PassComplete

    with reading(layout.decoder), ExitStack() as hooks:
        hooks.enter_context(layout.decoder.register_forward_pre_hook(begin, with_kwargs=True))
        for site in wanted:
            hooks.callback(attach(replace(places[site], streams=None), partial(record, site)).remove)
        yield activations


def _device(layout: Layout) -> torch.device:
    return input_device(layout.decoder)
