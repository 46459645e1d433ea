"""Activations of single texts, where sums of them don't do: for principal directions, probes and thresholds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.engines.transformers.read import Text, read_groups
from trimtab.errors import TrimtabError
from trimtab.steering import Site
from trimtab.steering.gates import Reading
from trimtab.steering.tensors import to_float64
from trimtab.text.chat import Prompt
from trimtab.text.pairs import Pair

if TYPE_CHECKING:
    from trimtab.lm import LM

Progress = Callable[[int, int], None]


def read_each(
    lm: LM, groups: Sequence[Sequence[Text]], sites: Sequence[Site], *, progress: Progress | None = None
) -> dict[Site, list[list[Tensor]]]:
    """What every text of every group has at its positions: `found[site][g][m]` is `[positions, width]`, float64, CPU.

    `progress(done, total)` counts groups. Raises `TrimtabError` for no texts, an unknown layer, a text that is too
    long, and for activations that aren't finite.
    """
    if not groups:
        raise TrimtabError("there is nothing to learn from")
    found: dict[Site, list[list[Tensor]]] = {site: [[] for _ in groups] for site in sites}
    done = 0
    for batch in read_groups(lm.layout, groups, sites):
        for site in sites:
            for g, members in zip(batch.groups, batch.values[site], strict=True):
                found[site][g] = [to_float64(x) for x in members]
                if not all(bool(torch.isfinite(x).all()) for x in members):
                    raise TrimtabError(
                        f"activations at layer {site.layer} are not finite; load the model in float32 or bfloat16"
                    )
        done += len(batch.groups)
        if progress is not None:
            progress(done, len(groups))
    return found


def read_pooled(
    lm: LM, prompts: Sequence[Prompt], readings: Sequence[Reading], *, progress: Progress | None = None
) -> dict[Reading, Tensor]:
    """What a gate would read of each prompt: for each reading `[prompts, width]`, float64, on the CPU.

    Prompts are rendered as `lm.generate` renders them. Raises `TrimtabError` as `read_each` does.
    """
    ids = [lm.encode(prompt) for prompt in prompts]
    tokens = [{reading: reading.tokens(len(one)) for reading in readings} for one in ids]
    positions = [sorted({p for where in one.values() for p in where}) for one in tokens]
    groups = [[Text(one, where)] for one, where in zip(ids, positions, strict=True)]
    sites = sorted({reading.site for reading in readings})
    found = read_each(lm, groups, sites, progress=progress)
    pooled = {}
    for reading in readings:
        rows = []
        for i, where in enumerate(positions):
            at = {p: n for n, p in enumerate(where)}
            rows.append(reading.pooled(found[reading.site][i][0][[at[p] for p in tokens[i][reading]]]))
        pooled[reading] = torch.stack(rows)
    return pooled


def pair_texts(lm: LM, pairs: Sequence[Pair], *, suffix: bool = False) -> list[list[Text]]:
    """The two texts of each pair, to be read at their last tokens, or with `suffix` at all tokens of the answers.

    Bare texts have no answer: with `suffix` they are read at all tokens. Raises `TrimtabError` for no pairs and for
    shapes other than answers and texts.
    """
    if not pairs:
        raise TrimtabError("there are no pairs to learn from")
    return [[_text(lm, pair, pair.positive, suffix), _text(lm, pair, pair.negative, suffix)] for pair in pairs]


def _text(lm: LM, pair: Pair, side: str, suffix: bool) -> Text:
    if pair.shape == "answers":
        opening = lm.encode(pair.prompt)
        ids = [*opening, *lm.tokenizer(side, add_special_tokens=False)["input_ids"]]
    elif pair.shape == "texts":
        opening, ids = [], lm.encode(side, chat=False)
    else:
        raise TrimtabError(f"this method learns from answers or texts, not from pairs of {pair.shape}")
    if len(ids) == len(opening):
        raise TrimtabError(f"an answer is empty: {side!r} has no tokens")
    return Text(ids, range(len(opening), len(ids)) if suffix else [len(ids) - 1])


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
