"""InstABoost: Guardieiro, Khare, Stein and Wong, "Instruction Following by Principled Boosting Attention of Large
Language Models", arXiv 2506.13734.

    score_ij += B            for columns j of the instruction, in all heads of all layers, at every query

With B = ln M this is the form of the paper's first version: a_ij <- M a_ij in the instruction's columns, with rows
renormalized.

The effect in a layer is bounded for any scores: no attention weight changes by more than a factor of e^B in either
direction, the weights inside the instruction keep their ratios, as do those outside, and a row's attention mass p on
the instruction becomes

    p e^B / (1 + p (e^B - 1))        which is larger by at most tanh(B / 4)

So a head's output moves by at most tanh(B / 4) times the distance between its mean values inside and outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.engines.transformers.attention import score_layers
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.steering import BiasScores, Steering, emphasis
from trimtab.text.spans import Emphasis

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.text.chat import Prompt

BIAS = math.log(3)
"""M = 3, the default of the authors' code, which chooses M among 1, 3, 5 … 19 on validation data (a bias of up to
2.9)."""


@keywords
def instaboost(
    lm: LM,
    prompt: Prompt,
    emphasize: Emphasis | Sequence[Emphasis],
    *,
    bias: float = BIAS,
    system: str | None = None,
    chat: bool | None = None,
) -> Steering:
    """A steering that adds `bias` to the attention scores of phrases in this prompt.

        answers = lm.generate(prompt, instaboost(lm, prompt, "Do not use commas."))

    Args:
        lm: The model that the prompt is for.
        prompt: The prompt, as for `lm.generate`.
        emphasize: The instruction: a phrase, a `Pattern`, a `Part`, or several of these.
        bias: B, in units of scores (natural logarithms of weights); `ln M` for the first version's multiplier M.
        system: The system message, as for `lm.generate`.
        chat: Whether to apply the chat template, as for `lm.generate`.

    Returns:
        A steering for this prompt only, since it contains the phrases' token positions. Its strength multiplies the
        bias.

    Raises:
        TrimtabError: The bias isn't a number above 0, or a phrase isn't in the prompt.
    """
    operation = BiasScores(bias)
    if not bias > 0:
        raise TrimtabError(
            f"InstABoost adds a bias above 0, got {bias:g}; to look away from a phrase, take a negative strength: -s"
        )
    spans = lm.spans(prompt, emphasize, system=system, chat=chat)
    return emphasis(operation, spans, score_layers(lm.layout), "instaboost")
