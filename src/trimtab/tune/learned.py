"""The starting point of a search: one pass over the pairs, and a steering for each operation at every layer to try."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.learn.contrast import Progress
from trimtab.learn.inputs import pairs_for
from trimtab.methods.instruct import instruct_card, learn_many, steering_from
from trimtab.steering import Steering
from trimtab.text.pairs import Pairs
from trimtab.tune.candidates import default_layers

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM

OPERATIONS = ("add", "project")


def learn_operations(
    lm: LM,
    pairs: Pairs,
    layers: Sequence[int] | None = None,
    operations: Sequence[str] = OPERATIONS,
    *,
    progress: Progress | None = None,
) -> dict[str, Steering]:
    """Instruction vectors (Stolfo et al., 2410.12877, section 3) at every layer, for each operation, in one pass.

    `operations` are those of `learn_instruct`, each with its own positions. `layers` defaults to `default_layers`.

    Raises `TrimtabError` for no pairs, pairs of answers, an unknown layer or operation, and a layer at which the pairs
    don't differ.
    """
    pairs = pairs_for(lm, pairs)
    chosen = default_layers(lm.layout.layers) if layers is None else layers
    moments = learn_many(lm, {"": pairs}, chosen, progress=progress)[""]
    card = instruct_card(lm, pairs, moments)
    return {name: steering_from(moments, operation=name, card=card) for name in operations}
