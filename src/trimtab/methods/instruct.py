"""Instruction vectors: Stolfo et al., "Improving Instruction-Following in Language Models through Activation
Steering", ICLR 2025, arXiv 2410.12877, section 3.

    m_l = mean over queries of (h_l[query + instruction] - h_l[query])    at the last prompt token
    h_l[t] <- h_l[t] + c * m_l        from the last prompt token on
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.engines.transformers.read import Text
from trimtab.errors import TrimtabError
from trimtab.learn.contrast import Progress, check_layers, contrast, learned_card
from trimtab.steering import Add, Edit, Positions, Site, Steering
from trimtab.text.pairs import Pair

if TYPE_CHECKING:
    from trimtab.lm import LM

DEPTH = 0.6


def learn_instruct(
    lm: LM,
    pairs: Sequence[Pair],
    layers: int | Sequence[int] | None = None,
    *,
    progress: Progress | None = None,
) -> Steering:
    """Learn the mean difference between prompts with and without an instruction, at the last prompt token.

    Each side is rendered by the chat template where there is one, up to where the answer begins. Default layer:
    the one at 0.6 of the depth. Strength 1 adds the raw difference.

    Raises `TrimtabError` for no pairs, an unknown layer, or pairs of answers (they are for `learn_caa`).
    """
    chosen = check_layers(lm, layers, DEPTH)
    texts = [(_text(lm, pair, pair.positive), _text(lm, pair, pair.negative)) for pair in pairs]
    moments = contrast(lm, texts, chosen, progress=progress)
    position = Positions.from_last_prompt_token()
    edits = tuple(Edit(Site(layer), Add(moments[layer].difference.float()), position) for layer in chosen)
    return Steering(
        edits, learned_card(lm, "instruct", pairs, moments, {"layers": chosen, "read_at": "last prompt token"})
    )


def _text(lm: LM, pair: Pair, side: str) -> Text:
    if pair.shape not in ("prompts", "texts"):
        raise TrimtabError(
            "instruction vectors are learned from pairs of prompts; pairs of answers are for the method caa"
        )
    ids = lm.encode(side)
    return Text(ids, [len(ids) - 1])
