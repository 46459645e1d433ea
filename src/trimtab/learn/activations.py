"""Activations of single texts, where sums of them don't do: for principal directions, probes and thresholds."""

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
from trimtab.engines.resolve import pooled, tokens_of
from trimtab.errors import TrimtabError
from trimtab.learn.contrast import Progress, mean, read_batches
from trimtab.steering import Site
from trimtab.steering.gates import Reading
from trimtab.steering.tensors import to_float64
from trimtab.text.answers import LAST, Answered, ReadAt, encode_sides, read_positions
from trimtab.text.chat import Prompt
from trimtab.text.pairs import Pair

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM


def read_each(
    lm: LM,
    groups: Sequence[Sequence[Text]],
    sites: Sequence[Site],
    *,
    pooled: bool = False,
    progress: Progress | None = None,
) -> dict[Site, list[list[Tensor]]]:
    """What every text of every group has at its positions: `found[site][g][m]` is `[positions, width]`, float64, CPU.

    `pooled` keeps only the mean over the positions, `[1, width]`. `progress(done, total)` counts groups. Raises
    `TrimtabError` for no texts, an unknown layer, a text that is too long, and for activations that aren't finite.
    """
    if not groups:
        raise TrimtabError("there is nothing to learn from")
    activations: dict[Site, list[list[Tensor]]] = {site: [[] for _ in groups] for site in sites}
    for batch in read_batches(lm, groups, sites, progress):
        for site in sites:
            for g, members in zip(batch.groups, batch.values[site], strict=True):
                activations[site][g] = [to_float64(mean(x) if pooled else x) for x in members]
                if not all(bool(torch.isfinite(x).all()) for x in members):
                    raise TrimtabError(
                        f"activations at layer {site.layer} are not finite; load the model in float32 or bfloat16"
                    )
    return activations


def read_pooled(
    lm: LM, prompts: Sequence[Prompt], readings: Sequence[Reading], *, progress: Progress | None = None
) -> dict[Reading, Tensor]:
    """What a gate would read of each prompt: for each reading `[prompts, width]`, float64, on the CPU.

    Prompts are rendered as `lm.generate` renders them. Raises `TrimtabError` as `read_each` does.
    """
    ids = [lm.encode(prompt) for prompt in prompts]
    positions = [tokens_of(readings, len(tokens)) for tokens in ids]
    groups = [[Text(tokens, where)] for tokens, where in zip(ids, positions, strict=True)]
    sites = sorted({reading.site for reading in readings})
    activations = read_each(lm, groups, sites, progress=progress)
    rows: dict[Reading, list[Tensor]] = {reading: [] for reading in readings}
    for i, tokens in enumerate(ids):
        values = {site: activations[site][i][0] for site in sites}
        for reading, x in pooled(readings, len(tokens), positions[i], values).items():
            rows[reading].append(x)
    return {reading: torch.stack(each) for reading, each in rows.items()}


def pair_texts(
    lm: LM, pairs: Sequence[Pair], *, suffix: bool = False, read_at: ReadAt = LAST, of: str = ""
) -> list[list[Text]]:
    """The two texts of each pair, to be read at their last tokens or where `read_at` says.

    With `suffix` they are read at all tokens of the answers, and bare texts, which have none, at all tokens. `of` names
    the pairs in errors, where there are several sets. Raises `TrimtabError` for no pairs, for shapes other than answers
    and texts, and for an answer that can't be read there, naming the pair.
    """
    if not pairs:
        raise TrimtabError("there are no pairs to learn from")
    named = [(f"pair {number}{of}", pair) for number, pair in enumerate(pairs, 1)]
    return [list(texts_of(lm, pair, suffix=suffix, read_at=read_at, name=name)) for name, pair in named]


def texts_of(
    lm: LM, pair: Pair, *, suffix: bool = False, read_at: ReadAt = LAST, name: str = "pair"
) -> tuple[Text, Text]:
    """The two texts of one pair, as `pair_texts` has them. `name` is what errors call it."""
    if pair.shape not in ("answers", "texts"):
        raise TrimtabError(f"this method learns from answers or texts, not from pairs of {pair.shape}")
    with naming(name):
        positive, negative = encode_sides(lm.tokenizer, pair)

    def text(side: Answered, which: str) -> Text:
        with naming(f"{name}, {which}"):
            check_length(lm.layout, len(side.ids), "the text")
            every = range(side.start, len(side.ids))
            return Text(side.ids, every if suffix else read_positions(lm.tokenizer, side, read_at))

    return text(positive, "positive"), text(negative, "negative")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Puts what an error is about in front of it."""
    try:
        yield
    except TrimtabError as error:
        raise type(error)(f"{what}: {error}") from error


def digest_of(**sets: Sequence[Prompt]) -> str:
    """A digest of named lists of prompts, in their order, for a card."""
    return hashlib.sha256(json.dumps(sets, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def in_two(prompts: Sequence[Prompt], what: str) -> tuple[list[Prompt], list[Prompt]]:
    """Every other prompt, and the rest: one half for a direction, the other, on which it wasn't learned, for a line.

    Raises `TrimtabError` for fewer than two.
    """
    if len(prompts) < 2:
        raise TrimtabError(f"there are {len(prompts)} {what}; a direction and a threshold need at least two")
    return list(prompts[::2]), list(prompts[1::2])
