"""SpotLight: Venkateswaran and Contractor, "Spotlight Your Instructions: Instruction-following with Dynamic Attention
Steering", arXiv 2505.12025, section 3.

    psi = attention on the span;   where psi < target:  score_ij += ln(target / psi)   for columns j of the span

in all heads of all layers. The mass is `target / (1 + target - psi)` afterwards, a little less than the target;
`exact=True` adds `ln(target (1 - psi) / (psi (1 - target)))` instead, and reaches it.

The public component takes one psi a layer, pooled over its heads and over the queries of a pass. Here `pool="layer"`
pools the heads of each query alone: else a text's outcome would depend on how its prompt is cut into passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.engines.transformers.attention import score_layers
from trimtab.keywords import keywords
from trimtab.steering import Steering, TargetMass, emphasis
from trimtab.text.spans import Emphasis

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.text.chat import Prompt

TARGET = 0.2


@keywords
def spotlight(
    lm: LM,
    prompt: Prompt,
    emphasize: Emphasis | Sequence[Emphasis],
    *,
    target: float = TARGET,
    pool: str = "head",
    exact: bool = False,
    system: str | None = None,
    chat: bool | None = None,
) -> Steering:
    """The steering that keeps `target` of the attention on phrases of this prompt.

    Raises `TrimtabError` for a target not between 0 and 1, and for phrases that aren't in the prompt.
    """
    spans = lm.spans(prompt, emphasize, system=system, chat=chat)
    return emphasis(TargetMass(target, pool, exact), spans, score_layers(lm.layout), "spotlight")
