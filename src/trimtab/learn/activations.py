"""Activations of individual texts, for principal directions, probes and thresholds, for which sums aren't enough."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.engines.contract import check_length
from trimtab.engines.request import Text
from trimtab.engines.resolve import pool_readings, positions_read
from trimtab.errors import TrimtabError
from trimtab.learn.contrast import Progress, mean_over_positions, read_batches
from trimtab.steering import Site
from trimtab.steering.gates import Reading
from trimtab.steering.tensors import check_finite, to_float64
from trimtab.text.answers import LAST, EncodedSide, ReadAt, encode_sides, read_positions
from trimtab.text.chat import Prompt
from trimtab.text.pairs import Pair

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM


def read_activations(
    lm: LM,
    groups: Sequence[Sequence[Text]],
    sites: Sequence[Site],
    *,
    pooled: bool = False,
    progress: Progress | None = None,
) -> dict[Site, list[list[Tensor]]]:
    """The activations of every text at its positions.

    Args:
        lm: The model.
        groups: Groups of texts.
        sites: The sites to read.
        pooled: Keep only the mean over a text's positions, `[1, width]`.
        progress: `progress(done, total)` counts groups.

    Returns:
        For each site, `activations[site][g][m]` of member m of group g: `[positions, width]`, float64, on the CPU.

    Raises:
        TrimtabError: There are no texts, a layer is unknown, a text is too long, or activations aren't finite.
    """
    if not groups:
        raise TrimtabError("there are no texts to learn from")
    activations: dict[Site, list[list[Tensor]]] = {site: [[] for _ in groups] for site in sites}
    for batch in read_batches(lm, groups, sites, progress):
        for site in sites:
            for g, members in zip(batch.groups, batch.values[site], strict=True):
                activations[site][g] = [to_float64(mean_over_positions(x) if pooled else x) for x in members]
                for x in members:
                    check_finite(x, site)
    return activations


def read_pooled(
    lm: LM, prompts: Sequence[Prompt], readings: Sequence[Reading], *, progress: Progress | None = None
) -> dict[Reading, Tensor]:
    """The activations that a gate would read in each prompt: for each reading `[prompts, width]`, float64, on the CPU.

    Prompts are rendered as in `lm.generate`. Raises `TrimtabError` as `read_activations` does.
    """
    ids = [lm.encode(prompt) for prompt in prompts]
    positions = [positions_read(readings, len(tokens)) for tokens in ids]
    groups = [[Text(tokens, where)] for tokens, where in zip(ids, positions, strict=True)]
    sites = sorted({reading.site for reading in readings})
    activations = read_activations(lm, groups, sites, progress=progress)
    rows: dict[Reading, list[Tensor]] = {reading: [] for reading in readings}
    for i, tokens in enumerate(ids):
        values = {site: activations[site][i][0] for site in sites}
        for reading, x in pool_readings(readings, len(tokens), positions[i], values).items():
            rows[reading].append(x)
    return {reading: torch.stack(each) for reading, each in rows.items()}


def pair_texts(
    lm: LM, pairs: Sequence[Pair], *, suffix: bool = False, read_at: ReadAt = LAST, set_label: str = ""
) -> list[list[Text]]:
    """The two texts of each pair, to be read at their last tokens or at `read_at`.

    Args:
        lm: The model.
        pairs: Answers or texts.
        suffix: Read all tokens of the answers instead; of bare texts all tokens.
        read_at: Where to read.
        set_label: A name for the set of pairs in error messages, such as `" of 'rude'"`.

    Returns:
        The positive and the negative text of each pair.

    Raises:
        TrimtabError: There are no pairs, pairs of another shape, or an answer that can't be read there; the message
            names the pair.
    """
    if not pairs:
        raise TrimtabError("there are no pairs to learn from")
    named = [(f"pair {number}{set_label}", pair) for number, pair in enumerate(pairs, 1)]
    return [list(texts_of(lm, pair, suffix=suffix, read_at=read_at, name=name)) for name, pair in named]


def texts_of(
    lm: LM, pair: Pair, *, suffix: bool = False, read_at: ReadAt = LAST, name: str = "pair"
) -> tuple[Text, Text]:
    """The two texts of one pair, as in `pair_texts`. `name` is the pair's name in error messages."""
    if pair.shape not in ("answers", "texts"):
        raise TrimtabError(f"this method learns from answers or texts, not from pairs of {pair.shape}")
    with error_prefix(name):
        positive, negative = encode_sides(lm.tokenizer, pair)

    def text(side: EncodedSide, which: str) -> Text:
        with error_prefix(f"{name}, {which}"):
            check_length(lm.layout, len(side.ids), "the text")
            every = range(side.start, len(side.ids))
            return Text(side.ids, every if suffix else read_positions(lm.tokenizer, side, read_at))

    return text(positive, "positive"), text(negative, "negative")


@contextmanager
def error_prefix(what: str) -> Iterator[None]:
    """A context that prefixes the message of a `TrimtabError` with `what`."""
    try:
        yield
    except TrimtabError as error:
        raise type(error)(f"{what}: {error}") from error


def digest_of(**sets: Sequence[Prompt]) -> str:
    """A digest of named lists of prompts, for a card. The order within a list matters."""
    return hashlib.sha256(json.dumps(sets, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def split_alternating(prompts: Sequence[Prompt], what: str) -> tuple[list[Prompt], list[Prompt]]:
    """Split prompts into two halves, alternating: one to learn a direction, the other, held out, for its threshold.

    Raises `TrimtabError` for fewer than two prompts; `what` names them.
    """
    if len(prompts) < 2:
        raise TrimtabError(f"there are {len(prompts)} {what}; a direction and a threshold need at least two")
    return list(prompts[::2]), list(prompts[1::2])
