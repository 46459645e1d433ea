"""SpotLight: Venkateswaran and Contractor, "Spotlight Your Instructions: Instruction-following with Dynamic Attention
Steering", arXiv 2505.12025, section 3.

    psi = attention mass on the span;   if psi < target:  score_ij += ln(target / psi)   for columns j of the span

in all heads of all layers. Afterwards the mass is `target / (1 + target - psi)`, a little less than the target;
`exact=True` adds `ln(target (1 - psi) / (psi (1 - target)))` instead, which reaches it.

The released component uses one psi per layer, pooled over its heads and over the queries of a pass. Here `pool="layer"`
only pools over the heads of each query: otherwise the result would depend on how the prefill is split into chunks.
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
    """A steering that keeps at least about `target` of the attention on phrases in this prompt.

    Args:
        lm: The model.
        prompt: The prompt.
        emphasize: The phrases: a phrase, a `Pattern`, a `Part`, or several of these.
        target: The share of a query's attention, between 0 and 1.
        pool: Whether psi is each head's own mass (`"head"`) or the mean over the layer's heads (`"layer"`).
        exact: Whether to reach the target exactly instead of the paper's formula.
        system: A system message.
        chat: Whether to apply the chat template.

    Returns:
        A steering for this prompt only.

    Raises:
        TrimtabError: The target isn't between 0 and 1, or a phrase isn't in the prompt.
    """
    spans = lm.spans(prompt, emphasize, system=system, chat=chat)
    return emphasis(TargetMass(target, pool, exact), spans, score_layers(lm.layout), "spotlight")
