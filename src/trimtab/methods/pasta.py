"""PASTA: Zhang et al., "Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs", ICLR 2024,
arXiv 2311.02262, section 3.

    a_ij <- a_ij / C             for columns j of the emphasized span
    a_ij <- alpha * a_ij / C     for the prompt's other columns, in chosen heads

which is adding ln(alpha) to the scores of the other columns. With several spans the other columns are those outside
of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trimtab.engines.transformers.attention import score_layers
from trimtab.errors import TrimtabError
from trimtab.steering import BiasScores, Steering, emphasis
from trimtab.text.spans import Emphasis

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.text.chat import Prompt

ALPHA = 0.01


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

    The paper finds its heads by profiling on a task; `None` takes all heads of all layers. `include` adds ln(alpha)
    inside of the span instead (alpha above 1 then emphasizes). Raises `TrimtabError` for an alpha that isn't
    positive and for phrases that aren't in the prompt.
    """
    if not alpha > 0:
        raise TrimtabError(f"alpha is a factor above 0, got {alpha}")
    spans = lm.spans(prompt, emphasize, system=system, chat=chat)
    layers = score_layers(lm.layout) if heads is None else sorted(heads)
    parts = []
    for layer in layers:
        chosen = tuple(heads[layer]) if isinstance(heads, Mapping) else None
        parts.append(emphasis(BiasScores(math.log(alpha), chosen, outside=not include), spans, [layer], "pasta"))
    if not parts:
        raise TrimtabError("PASTA needs heads to steer; give {layer: [heads]}, layers, or None for all")
    return Steering(tuple(edit for part in parts for edit in part.edits), parts[0].card)
