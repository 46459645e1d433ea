"""The inputs of the functions that learn, checked: a model, and pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from trimtab.engines.language_model import LanguageModel
from trimtab.errors import TrimtabError
from trimtab.text.pairs import Pair, Pairs, as_pairs


def check_lm(lm: Any, *features: str) -> None:
    """Raises unless this is an `LM` to learn with, of an engine that can do what is needed for it.

    Its activations can be read here, and nothing steers them: what is learned inside `lm.steered(…)`, of this `LM` or
    another over the same model, would be about another model.

    Args:
        lm: What was given.
        features: Those of `trimtab.engines.contract.FEATURES` that are needed beside reading activations.

    Raises:
        TrimtabError: It is something else, and what to give instead; or it is being steered.
        UnsupportedError: Its engine hasn't one of the features.
    """
    if isinstance(lm, nn.Module):
        raise TrimtabError(
            f"a steering is learned with the LM, and this is a model ({type(lm).__name__}): give lm where you gave"
            " lm.model, or LM(model, tokenizer)"
        )
    if isinstance(lm, (str, Path)):
        raise TrimtabError(f"a steering is learned with an LM, got {str(lm)!r}: give LM.load({str(lm)!r})")
    if not isinstance(lm, LanguageModel):
        raise TrimtabError(f"a steering is learned with an LM, got {type(lm).__name__}: give LM.load(…) first")
    lm.require(*features)
    if lm.is_steered:
        raise TrimtabError(
            "this model is being steered, so that what is learned now would be learned from steered activations; leave"
            " lm.steered(…) first"
        )


def pairs_for(lm: Any, pairs: Pairs, *features: str) -> list[Pair]:
    """The pairs that a model is to learn from. Raises `TrimtabError` as `check_lm` and `as_pairs` do."""
    check_lm(lm, *features)
    return as_pairs(pairs)
