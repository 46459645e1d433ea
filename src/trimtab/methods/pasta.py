"""PASTA: Zhang et al., "Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs", ICLR 2024,
arXiv 2311.02262, section 3.

    a_ij <- a_ij / C             for columns j of the emphasized span
    a_ij <- alpha * a_ij / C     for the prompt's other columns, in chosen heads

This is equivalent to adding ln(alpha) to the scores of the other columns. With several spans, the other columns are
those outside all of them.

The released code (github.com/QingruZhang/PASTA) calls this `scale_position="exclude"`. Its `"include"` adds ln(alpha)
in the span and then subtracts it in all of the prompt's columns, which leaves the span and the generated tokens
unchanged and lowers the others: the same as "exclude" with 1 / alpha. With several spans, its "exclude" lowers each
span's complement in turn, so that spans lower each other; `pasta(lm, prompt, a) + pasta(lm, prompt, b)` does the same.
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
    """A steering that shifts attention towards phrases in this prompt, in chosen heads.

    Args:
        lm: The model.
        prompt: The prompt.
        emphasize: The part of it to emphasize: a phrase, `Pattern("…")`, `Part("system")`, or a list of these.
        heads: `{layer: [heads]}`, or a list of layers for all their heads. The paper finds them by profiling on a task.
            `None` uses all heads of all layers.
        alpha: The factor for attention outside the span, before normalization. With `include`, the factor for attention
            inside the span, as in the released code, so that values above 1 emphasize it.
        include: Interpret `alpha` like the released code's `scale_position="include"`.
        system: A system message.
        chat: Whether to apply the chat template.

    Returns:
        A steering for this prompt only.

    Raises:
        TrimtabError: alpha isn't positive, or a phrase isn't in the prompt.
    """
    if not alpha > 0:
        raise TrimtabError(f"alpha is a factor above 0, got {alpha}")
    spans = lm.spans(prompt, emphasize, system=system, chat=chat)
    bias = -math.log(alpha) if include else math.log(alpha)
    layers = score_layers(lm.layout) if heads is None else sorted(heads)
    parts = []
    for layer in layers:
        chosen_heads = tuple(heads[layer]) if isinstance(heads, Mapping) else None
        parts.append(emphasis(BiasScores(bias, chosen_heads, outside=True), spans, [layer], "pasta"))
    if not parts:
        raise TrimtabError("PASTA needs heads to steer; give {layer: [heads]}, layers, or None for all")
    return Steering(tuple(edit for part in parts for edit in part.edits), parts[0].card)
