"""InstABoost: Guardieiro, Khare, Stein and Wong, "Instruction Following by Principled Boosting Attention of Large
Language Models", arXiv 2506.13734.

    score_ij += B            for columns j of the instruction, in all heads of all layers, at every query

With B = ln M it is the first version's form: a_ij <- M a_ij in the instruction's columns, and a row divided by its sum.

In each layer it is bounded, whatever the scores there: no weight changes by more than a factor of e^B either way, the
weights inside of the instruction keep their ratios, as those outside do, and a row that gives it the mass p gives it

    p e^B / (1 + p (e^B - 1))        afterwards, which is at most tanh(B / 4) more

so that a head's output moves by at most tanh(B / 4) times the distance between what it reads inside and outside.
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
"""Attention to the instruction three times as likely as to the rest: the default of the authors' code, which chooses
M among 1, 3, 5 … 19 on validation data, a bias of up to 2.9."""


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
    """The steering that adds `bias` to the attention scores of phrases of this prompt.

        answers = lm.generate(prompt, instaboost(lm, prompt, "Do not use commas."))

    Args:
        lm: The model that the prompt is for.
        prompt: The prompt, as `lm.generate` gets it.
        emphasize: The instruction: a phrase, a `Pattern`, a `Part`, or several of these.
        bias: B, in units of scores (natural logarithms of weights); `ln M` for the first version's multiplier M.
        system: The system message, as `lm.generate` gets it.
        chat: Whether the prompt is put into the chat template, as `lm.generate` gets it.

    Returns:
        A steering for this prompt alone, since it names the prompt's tokens. Its strength multiplies the bias.

    Raises:
        TrimtabError: A bias that isn't a number above 0, and phrases that aren't in the prompt.
    """
    operation = BiasScores(bias)
    if not bias > 0:
        raise TrimtabError(
            f"InstABoost adds a bias above 0, got {bias:g}; to look away from a phrase, take a negative strength: -s"
        )
    spans = lm.spans(prompt, emphasize, system=system, chat=chat)
    return emphasis(operation, spans, score_layers(lm.layout), "instaboost")
