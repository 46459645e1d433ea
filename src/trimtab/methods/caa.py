"""Contrastive activation addition (CAA): Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition",
ACL 2024, arXiv 2312.06681, section 3.

    v[l] = mean over pairs of (h_l[positive] - h_l[negative])        read at the answer's letter
    h_l[t] <- h_l[t] + m * v[l]        for t from the last prompt token on, at one layer l
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.engines.transformers.read import Text
from trimtab.errors import TrimtabError
from trimtab.learn.contrast import Progress, check_layers, contrast, learned_card
from trimtab.steering import Add, Edit, Positions, Site, Steering
from trimtab.text.chat import has_template
from trimtab.text.letters import answer_ids, letter_of
from trimtab.text.pairs import Pair

if TYPE_CHECKING:
    from trimtab.lm import LM

DEPTH = 0.4
"""Where CAA works best in the paper: layer 13 of 32 (7B) and 14 of 40 (13B)."""

BASE_FORMAT = "Input: {question}\nResponse:"


def learn_caa(
    lm: LM,
    pairs: Sequence[Pair],
    layers: int | Sequence[int] | None = None,
    *,
    progress: Progress | None = None,
) -> Steering:
    """Learn the mean difference of the pairs' activations at each layer (default: the one at 0.4 of the depth).

    Multiple-choice pairs are read at the answer's letter, other answers and texts at their last token. The
    steering adds the raw difference from the last prompt token on: strength 1 is the paper's multiplier 1.

    Raises `TrimtabError` for no pairs, an unknown layer, an answer that is no bracketed letter, or pairs of
    prompts (they are for `learn_instruct`).
    """
    chosen = check_layers(lm, layers, DEPTH)
    texts = [(_text(lm, pair, pair.positive), _text(lm, pair, pair.negative)) for pair in pairs]
    moments = contrast(lm, texts, chosen, progress=progress)
    position = Positions.from_last_prompt_token()
    edits = tuple(Edit(Site(layer), Add(moments[layer].difference.float()), position) for layer in chosen)
    options = {"layers": chosen, "read_at": "letter" if pairs[0].shape == "letters" else "last token"}
    return Steering(edits, learned_card(lm, "caa", pairs, moments, options))


def _text(lm: LM, pair: Pair, side: str) -> Text:
    """The ids of one side of a pair, and the position at which it is read (section 3.1)."""
    if pair.shape == "letters":
        chat = has_template(lm.tokenizer)
        prompt = lm.encode(pair.prompt) if chat else lm.encode(BASE_FORMAT.format(question=pair.prompt), chat=False)
        opening, letter, closing = answer_ids(lm.tokenizer, letter_of(side), after_space=not chat)
        return Text([*prompt, *opening, letter, *closing], [len(prompt) + len(opening)])
    if pair.shape == "answers":
        ids = [*lm.encode(pair.prompt), *lm.tokenizer(side, add_special_tokens=False)["input_ids"]]
    elif pair.shape == "texts":
        ids = lm.encode(side, chat=False)
    else:
        raise TrimtabError("CAA learns from answers or texts; pairs of prompts are for the method instruct")
    return Text(ids, [len(ids) - 1])
