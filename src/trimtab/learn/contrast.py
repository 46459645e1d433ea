"""Moments of the activations of pairs of texts, for many layers in one pass over the data.

A text that is read at several positions counts by the mean of its activations there. Only one batch is in memory at a
time.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from operator import index
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from trimtab.engines.contract import TOKENS_PER_BATCH
from trimtab.engines.request import Batch, Text
from trimtab.errors import TrimtabError
from trimtab.learn.moments import PairMoments
from trimtab.steering import Card, Site
from trimtab.steering.tensors import check_finite, to_float64
from trimtab.text.pairs import Pair, digest

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM

Progress = Callable[[int, int], None]
TextPair = tuple[Text, Text]
MomentsT = TypeVar("MomentsT", bound=PairMoments)


def contrast(
    lm: LM,
    pairs: Sequence[TextPair],
    layers: Sequence[int],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> dict[int, PairMoments]:
    """The moments of (positive, negative) texts at each layer, over each text's mean activation at its positions.

    Args:
        lm: The model.
        pairs: The (positive, negative) texts.
        layers: The layers.
        tokens_per_batch: The token budget of a batch.
        progress: `progress(done, total)` counts pairs.

    Returns:
        The moments by layer.

    Raises:
        TrimtabError: There are no pairs, an unknown layer, a text that is too long, or activations that aren't finite.
    """
    if not pairs:
        raise TrimtabError("there are no pairs to learn from")
    if not layers:
        raise TrimtabError("no layer is named")
    sites = [Site(layer) for layer in layers]
    moments = {layer: PairMoments(lm.layout.width) for layer in layers}
    for batch in read_batches(lm, pairs, sites, progress, tokens_per_batch=tokens_per_batch):
        for site in sites:
            values = _means(batch, site)  # [pairs, 2, width]
            moments[site.layer].add(values[:, 0], values[:, 1])
    return moments


def contrast_many(
    lm: LM,
    sets: Mapping[str, Sequence[TextPair]],
    layers: Sequence[int],
    *,
    moments_type: type[MomentsT] = PairMoments,  # type: ignore[assignment]
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> dict[str, dict[int, MomentsT]]:
    """Like `contrast`, for several sets of (positive, negative) texts, by name and layer, in one pass.

    Every text is read once, even if it is in several pairs. A negative and all its positives, from all sets, are one
    group, whose common prefix is computed once.

    Args:
        lm: The model.
        sets: The (positive, negative) texts by the set's name.
        layers: The layers.
        moments_type: What to keep for each set and layer: sums, or with `PairMembers` all activations.
        tokens_per_batch: The token budget of a batch.
        progress: `progress(done, total)` counts pairs.

    Returns:
        The moments by name and layer.

    Raises:
        TrimtabError: As in `contrast`; the message names the set that has no pairs.
    """
    for name, pairs in sets.items():
        if not pairs:
            raise TrimtabError(f"there are no pairs to learn {name!r} from")
    if not sets:
        raise TrimtabError("there are no pairs to learn from")
    if not layers:
        raise TrimtabError("no layer is named")
    groups, set_members = _group_by_negative(sets)
    # lm.read counts a group of texts with a common prefix as one row, which is accurate for about two of them
    budget = max(1, 2 * tokens_per_batch // max(len(group) for group in groups))
    sites = [Site(layer) for layer in layers]
    moments = {name: {layer: moments_type(lm.layout.width) for layer in layers} for name in sets}
    done, total = 0, sum(len(pairs) for pairs in sets.values())
    for batch in lm.read(groups, sites, tokens_per_batch=budget):
        indices_by_set: dict[str, list[tuple[int, int]]] = {}
        for row, g in enumerate(batch.groups):
            for name, member in set_members[g]:
                indices_by_set.setdefault(name, []).append((row, member))
        for site in sites:
            values = _means(batch, site)  # [groups, members, width]
            for name, set_indices in indices_by_set.items():
                rows, members = torch.tensor(set_indices).T
                moments[name][site.layer].add(values[rows, members], values[rows, 0])
        done += sum(len(where) for where in indices_by_set.values())
        if progress is not None:
            progress(done, total)
    return moments


def read_batches(
    lm: LM,
    groups: Sequence[Sequence[Text]],
    sites: Sequence[Site],
    progress: Progress | None,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Iterator[Batch]:
    """The batches of `lm.read`. `progress(done, total)` counts groups after each batch."""
    done = 0
    for batch in lm.read(groups, sites, tokens_per_batch=tokens_per_batch):
        yield batch
        done += len(batch.groups)
        if progress is not None:
            progress(done, len(groups))


def _group_by_negative(sets: Mapping[str, Sequence[TextPair]]) -> tuple[list[list[Text]], list[list[tuple[str, int]]]]:
    """Groups of a negative and all its positives; and for each group, the (set, member) pairs that contrast with it."""
    groups: list[list[Text]] = []
    set_members: list[list[tuple[str, int]]] = []
    group_by_key: dict[tuple, int] = {}
    members: list[dict[tuple, int]] = []
    for name, pairs in sets.items():
        for positive, negative in pairs:
            g = group_by_key.setdefault(_key(negative), len(groups))
            if g == len(groups):
                groups.append([negative])
                set_members.append([])
                members.append({})
            m = members[g].setdefault(_key(positive), len(groups[g]))
            if m == len(groups[g]):
                groups[g].append(positive)
            set_members[g].append((name, m))
    return groups, set_members


def _key(text: Text) -> tuple:
    return tuple(text.ids), tuple(text.positions)


def _means(batch: Batch, site: Site) -> Tensor:
    """Each text's mean activation over its positions: `[groups, members, width]`, float64, on the CPU."""
    texts = [mean_over_positions(text) for group in batch.values[site] for text in group]
    values = torch.cat(texts)
    check_finite(values, site)
    return to_float64(values).view(len(batch.groups), -1, values.shape[-1])


def mean_over_positions(values: Tensor) -> Tensor:
    """The mean `[1, width]` of a text's activations `[positions, width]`, on their device; a single row is returned."""
    if len(values) == 1:
        return values
    wide = values.float() if values.device.type == "mps" else values.double()  # MPS has no float64
    return wide.mean(0, keepdim=True)


def check_layers(lm: LM, layers: Sequence[int] | int | None, default: float) -> list[int]:
    """The requested layers, in ascending order; for `None`, the one at the relative depth `default` (0 … 1).

    Raises `TrimtabError` for anything but integers, and for layers that the model doesn't have.
    """
    if layers is None:
        layers = [round(default * lm.layout.layers)]
    try:
        listed = sorted({index(layer) for layer in (layers if isinstance(layers, Iterable) else [layers])})
        if isinstance(layers, bool):
            raise TypeError
    except TypeError:
        raise TrimtabError(f"layers are a whole number, or a list of them such as [12, 14], got {layers!r}") from None
    for layer in listed:
        if not 0 <= layer < lm.layout.layers:
            raise TrimtabError(f"there is no layer {layer}; {lm.name} has layers 0 to {lm.layout.layers - 1}")
    return listed


def learned_card(
    lm: LM, method: str, pairs: Sequence[Pair], moments: Mapping[int, PairMoments], options: dict[str, Any]
) -> Card:
    """The card of a steering learned from pairs. Its content is reproducible, so it has no date."""
    measured = {"pairs": len(pairs), **measured_by_layer(moments)}
    return Card(
        method=method, model=lm.identity, data=digest(pairs), options=options, measured=measured, versions=versions()
    )


def measured_by_layer(moments: Mapping[int, PairMoments]) -> dict[str, dict[str, float]]:
    """The pairs' agreement and the norm of the activations at each layer, as a card has them."""
    return {
        "agreement": {str(layer): round(m.agreement, 6) for layer, m in moments.items()},
        "activation_norm": {str(layer): round(m.norm, 6) for layer, m in moments.items()},
    }


def versions() -> dict[str, str]:
    """The versions of the software that a learned direction depends on."""
    installed = {"python": platform.python_version()}
    for package in ("trimtab", "torch", "transformers"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "unknown"
    return installed
