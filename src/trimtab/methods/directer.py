"""DIRECTER: dynamic rejection steering, arXiv 2603.06745, sections 3 and 4.

    k_i <- alpha * k_i            for cached keys i of the instruction, in a set S of layers
    c(S) = argmax of the logits so steered, over the raw cache
    emit the first c(S) with p_raw(c) >= beta * max p_raw, for S = all layers, the best half, a quarter, ...;
    the raw token where there is none
    layers are ranked by how far the steering of each alone disturbs attention (`trimtab.decoding.ranking`)

Published with alpha = 100 and beta = 0.5 for all tasks. The released code departs from the text: it ranks layers by
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
    """The steering towards an instruction of this prompt, to be generated from with `rejection=REJECTION`.

        answers = lm.generate(prompt, directer(lm, prompt, "Do not use commas."), rejection=REJECTION)

    which is what `lm.generate(prompt, emphasize="Do not use commas.")` does. Raises `TrimtabError` when the
    instruction isn't in the prompt.
    """
    spans = lm.spans(prompt, instruction, system=system, chat=chat)
    return emphasis(ScaleScores(alpha), spans, score_layers(lm.layout), "directer")
