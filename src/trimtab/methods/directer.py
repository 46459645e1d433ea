"""DIRECTER: dynamic rejection steering, arXiv 2603.06745, sections 3 and 4.

    k_i <- alpha * k_i            for cached keys i of the instruction, in a set S of layers
    c(S) = argmax of the steered logits, over the unsteered KV cache
    emit the first c(S) with p(c) >= beta * max p, for S = all layers, the best half, a quarter, ...;
    the unsteered token if there is none; p is the unsteered model's distribution
    layers are ranked by how much steering each one alone disturbs attention (`trimtab.decoding.ranking`)

The paper uses alpha = 100 and beta = 0.5 for all tasks. The released code differs from the text: it ranks layers by
another formula (`Rejection(ranking="repo")`) and never tries a single layer (`min_layers=2`, kept as the default).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.decoding.rejection import Rejection
from trimtab.engines.transformers.attention import score_layers
from trimtab.keywords import keywords
from trimtab.steering import ScaleScores, Steering, emphasis
from trimtab.text.spans import Emphasis

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.text.chat import Prompt

ALPHA = 100.0
REJECTION = Rejection(beta=0.5, min_layers=2)


@keywords
def directer(
    lm: LM,
    prompt: Prompt,
    instruction: Emphasis | Sequence[Emphasis],
    *,
    alpha: float = ALPHA,
    system: str | None = None,
    chat: bool | None = None,
) -> Steering:
    """A steering towards an instruction in this prompt, to use with `rejection=REJECTION`.

        answers = lm.generate(prompt, directer(lm, prompt, "Do not use commas."), rejection=REJECTION)

    `lm.generate(prompt, emphasize="Do not use commas.")` does the same.

    Args:
        lm: The model.
        prompt: The prompt, as for `lm.generate`.
        instruction: The instruction: a phrase, a `Pattern`, a `Part`, or several of these.
        alpha: The factor for the keys of the instruction.
        system: The system message, as for `lm.generate`.
        chat: Whether to apply the chat template, as for `lm.generate`.

    Returns:
        A steering for this prompt only, since it contains the instruction's token positions.

    Raises:
        TrimtabError: The instruction isn't in the prompt.
    """
    spans = lm.spans(prompt, instruction, system=system, chat=chat)
    return emphasis(ScaleScores(alpha), spans, score_layers(lm.layout), "directer")
