"""From pairs of texts to moments of their activations, for many layers in one pass over the model.

A text that is read at several positions counts by the mean of its activations there. No more than a batch is kept.
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
from trimtab.steering.tensors import to_float64
from trimtab.text.pairs import Pair, digest

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM

Progress = Callable[[int, int], None]
TextPair = tuple[Text, Text]
Kept = TypeVar("Kept", bound=PairMoments)


def contrast(
    lm: LM,
    pairs: Sequence[TextPair],
    layers: Sequence[int],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> dict[int, PairMoments]:
    """The moments of (positive, negative) texts at each layer: of each text's mean over the positions it is read at.

    `progress(done, total)` counts pairs. Raises `TrimtabError` for no pairs, an unknown layer, or a text that
    is too long, and for activations that aren't finite.
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
    keep: type[Kept] = PairMoments,  # type: ignore[assignment]
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> dict[str, dict[int, Kept]]:
    """`contrast` for many sets of (positive, negative) texts, by the set's name and the layer, in one pass.

    Every text is read once, whatever number of pairs it is in: a negative that all sets share, with all its
    positives, is one group, whose common beginning runs once. `keep` is what is kept of each set at each layer: sums,
    or with `PairMembers` all activations. `progress(done, total)` counts pairs.

    Raises `TrimtabError` as `contrast` does, naming the set that has no pairs.
    """
    for name, pairs in sets.items():
        if not pairs:
            raise TrimtabError(f"there are no pairs to learn {name!r} from")
    if not sets:
        raise TrimtabError("there are no pairs to learn from")
    if not layers:
        raise TrimtabError("no layer is named")
    groups, uses = _grouped(sets)
    # read_groups counts a group of texts with one beginning as one row, which is right for about two of them
    budget = max(1, 2 * tokens_per_batch // max(len(group) for group in groups))
    sites = [Site(layer) for layer in layers]
    moments = {name: {layer: keep(lm.layout.width) for layer in layers} for name in sets}
    done, total = 0, sum(len(pairs) for pairs in sets.values())
    for batch in lm.read(groups, sites, tokens_per_batch=budget):
        places: dict[str, list[tuple[int, int]]] = {}
        for row, g in enumerate(batch.groups):
            for name, member in uses[g]:
                places.setdefault(name, []).append((row, member))
        for site in sites:
            values = _means(batch, site)  # [groups, members, width]
            for name, where in places.items():
                rows, members = torch.tensor(where).T
                moments[name][site.layer].add(values[rows, members], values[rows, 0])
        done += sum(len(where) for where in places.values())
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
    """What `lm.read` gives; `progress(done, total)` counts groups, after each batch."""
    done = 0
    for batch in lm.read(groups, sites, tokens_per_batch=tokens_per_batch):
        yield batch
        done += len(batch.groups)
        if progress is not None:
            progress(done, len(groups))


def _grouped(sets: Mapping[str, Sequence[TextPair]]) -> tuple[list[list[Text]], list[list[tuple[str, int]]]]:
    """Groups of a negative and all its positives; and for each, which set pairs which member with the negative."""
    groups: list[list[Text]] = []
    uses: list[list[tuple[str, int]]] = []
    known: dict[tuple, int] = {}
    members: list[dict[tuple, int]] = []
    for name, pairs in sets.items():
        for positive, negative in pairs:
            g = known.setdefault(_key(negative), len(groups))
            if g == len(groups):
                groups.append([negative])
                uses.append([])
                members.append({})
            m = members[g].setdefault(_key(positive), len(groups[g]))
            if m == len(groups[g]):
                groups[g].append(positive)
            uses[g].append((name, m))
    return groups, uses


def _key(text: Text) -> tuple:
    return tuple(text.ids), tuple(text.positions)


def _means(batch: Batch, site: Site) -> Tensor:
    """What is read of each text, the mean over its positions: `[groups, members, width]`, float64, on the CPU."""
    texts = [mean(text) for group in batch.values[site] for text in group]
    values = torch.cat(texts)
    if not torch.isfinite(values).all():
        raise TrimtabError(f"activations at layer {site.layer} are not finite; load the model in float32 or bfloat16")
    return to_float64(values).view(len(batch.groups), -1, values.shape[-1])


def mean(values: Tensor) -> Tensor:
    """The mean `[1, width]` of a text's activations `[positions, width]`, where they are: one is left as it is."""
    if len(values) == 1:
        return values
    wide = values.float() if values.device.type == "mps" else values.double()  # MPS has no float64
    return wide.mean(0, keepdim=True)


def check_layers(lm: LM, layers: Sequence[int] | int | None, default: float) -> list[int]:
    """The requested layers, in order; `None` is the one at `default` of the depth (0 … 1).

    Raises `TrimtabError` for what isn't a whole number, or no layer of this model.
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
    """The card of a steering learned from pairs; everything in it is repeatable, so there is no date."""
    measured = {
        "pairs": len(pairs),
        "agreement": {str(layer): round(m.agreement, 6) for layer, m in moments.items()},
        "activation_norm": {str(layer): round(m.norm, 6) for layer, m in moments.items()},
    }
    return Card(
        method=method, model=lm.identity, data=digest(pairs), options=options, measured=measured, versions=versions()
    )


def versions() -> dict[str, str]:
    """The versions of what a learned direction depends on."""
    installed = {"python": platform.python_version()}
    for package in ("trimtab", "torch", "transformers"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "unknown"
    return installed
