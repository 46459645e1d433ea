"""What a search starts from: one pass over the pairs, and a steering for each operation at every layer to try."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.engines.transformers.read import Text
from trimtab.errors import TrimtabError
from trimtab.learn.contrast import Progress, check_layers, contrast, learned_card
from trimtab.learn.moments import PairMoments
from trimtab.steering import Add, Edit, Operation, Positions, SetProjection, Site, Steering
from trimtab.text.pairs import Pair
from trimtab.tune.candidates import default_layers

if TYPE_CHECKING:
    from trimtab.lm import LM

POSITIONS = {"add": Positions.from_last_prompt_token(), "project": Positions.all_but_first()}
"""Where each operation acts unless told otherwise. The first token is left alone: in many models it is an attention
sink with an outsized projection, which would be rewritten."""


def learn_operations(
    lm: LM,
    pairs: Sequence[Pair],
    layers: Sequence[int] | None = None,
    operations: Sequence[str] = tuple(POSITIONS),
    *,
    progress: Progress | None = None,
) -> dict[str, Steering]:
    """Instruction vectors (Stolfo et al., 2410.12877, section 3) at every layer, for each operation, in one pass.

    `"add"` adds the mean difference of prompts with and without the instruction, at strength 1 all of it;
    `"project"` sets the projection on its direction to the mean with the instruction. `layers` defaults to
    `default_layers`.

    Raises `TrimtabError` for no pairs, pairs of answers, an unknown layer or operation, and for a layer at which
    the pairs don't differ.
    """
    if unknown := [name for name in operations if name not in MAKE]:
        raise TrimtabError(f"there is no operation {unknown[0]!r} to try; use {' or '.join(MAKE)}")
    if wrong := {pair.shape for pair in pairs} - {"prompts", "texts"}:
        raise TrimtabError(f"instructions are learned from pairs of prompts, these are pairs of {wrong.pop()}")
    chosen = check_layers(lm, default_layers(lm.layout.layers) if layers is None else layers, 0.0)
    texts = [(_text(lm, pair.positive), _text(lm, pair.negative)) for pair in pairs]
    moments = contrast(lm, texts, chosen, progress=progress)
    if same := [layer for layer in chosen if float(moments[layer].difference.norm()) == 0]:
        raise TrimtabError(f"at layer {same[0]} both sides of the pairs are the same on average; try other layers")
    found = {}
    for name in operations:
        edits = []
        for layer in chosen:
            edits.append(Edit(Site(layer), MAKE[name](moments[layer]), POSITIONS[name]))
        options = {"layers": chosen, "read_at": "last prompt token", "operation": name}
        found[name] = Steering(tuple(edits), learned_card(lm, "instruct", pairs, moments, options))
    return found


def _add(moments: PairMoments) -> Operation:
    return Add(moments.difference.float())


def _project(moments: PairMoments) -> Operation:
    return SetProjection((moments.difference / moments.difference.norm()).float(), moments.target())


def _text(lm: LM, prompt: str) -> Text:
    ids = lm.encode(prompt)
    return Text(ids, [len(ids) - 1])


MAKE = {"add": _add, "project": _project}
