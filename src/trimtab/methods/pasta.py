"""PASTA: Zhang et al., "Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs", ICLR 2024,
arXiv 2311.02262, section 3.

    a_ij <- a_ij / C             for columns j of the emphasized span
    a_ij <- alpha * a_ij / C     for the prompt's other columns, in chosen heads

which is adding ln(alpha) to the scores of the other columns. With several spans the other columns are those outside
of all of them.

The released code (github.com/QingruZhang/PASTA) calls this `scale_position="exclude"`. Its `"include"` adds ln(alpha)
in the span and then takes it from all of the prompt's columns, which leaves the span and what is generated as they are
and lowers the others: "exclude" with 1 / alpha. With several spans its "exclude" lowers each span's complement in turn,
so that spans lower each other; `pasta(lm, prompt, a) + pasta(lm, prompt, b)` does that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trimtab.engines.transformers.attention import score_layers
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.steering import BiasScores, Steering, emphasis
from trimtab.text.spans import Emphasis

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.text.chat import Prompt

ALPHA = 0.01


@keywords
def pasta(
    lm: LM,
    prompt: Prompt,
    emphasize: Emphasis | Sequence[Emphasis],
    heads: Mapping[int, Sequence[int]] | Sequence[int] | None = None,
    *,
    alpha: float = ALPHA,
    include: bool = False,
    system: str | None = None,
    chat: bool | None = None,
) -> Steering:
    """The steering towards phrases of this prompt in the heads of `{layer: [heads]}`; layers alone: all their heads.

    Args:
        lm: The model.
        prompt: The prompt.
        emphasize: The part of it to emphasize: a phrase, `Pattern("…")`, `Part("system")`, or a list of these.
        heads: `{layer: [heads]}`, or layers for all their heads. The paper finds them by profiling on a task; `None`
            takes all heads of all layers.
        alpha: The factor of attention outside of the span before it is normalised; with `include`, what the span's is
            multiplied by in the released code, so that above 1 it emphasizes.
        include: Reads `alpha` as the released code's `scale_position="include"` does.
        system: A system message.
        chat: Whether the prompt goes through the chat template.

    Returns:
        The steering, for this prompt alone.

    Raises:
        TrimtabError: alpha isn't positive, or the phrases aren't in the prompt.
    """
    if not alpha > 0:
        raise TrimtabError(f"alpha is a factor above 0, got {alpha}")
    spans = lm.spans(prompt, emphasize, system=system, chat=chat)
    bias = -math.log(alpha) if include else math.log(alpha)
    layers = score_layers(lm.layout) if heads is None else sorted(heads)
    parts = []
    for layer in layers:
        chosen = tuple(heads[layer]) if isinstance(heads, Mapping) else None
        parts.append(emphasis(BiasScores(bias, chosen, outside=True), spans, [layer], "pasta"))
    if not parts:
        raise TrimtabError("PASTA needs heads to steer; give {layer: [heads]}, layers, or None for all")
    return Steering(tuple(edit for part in parts for edit in part.edits), parts[0].card)
