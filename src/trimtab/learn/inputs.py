"""Checks of the inputs of functions that learn: a model, and pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from trimtab.engines.language_model import LanguageModel
from trimtab.errors import TrimtabError
from trimtab.text.pairs import Pair, Pairs, as_pairs


def check_lm(lm: Any, *features: str) -> None:
    """Raise unless this is an `LM` that can be learned from, on an engine with the required features.

    It must not be steered: inside `lm.steered(…)`, of this `LM` or of another one for the same model, a steering would
    be learned from steered activations.

    Args:
        lm: The value to check.
        features: The names in `trimtab.engines.contract.FEATURES` that are required besides reading activations.

    Raises:
        TrimtabError: It isn't an `LM` (the message says what to pass instead), or it is being steered.
        UnsupportedError: Its engine lacks one of the features.
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
            "this model is being steered, so a steering would be learned from steered activations; leave"
            " lm.steered(…) first"
        )


def pairs_for(lm: Any, pairs: Pairs, *features: str) -> list[Pair]:
    """Check the model and convert `pairs` to a list of `Pair`. Raises as `check_lm` and `as_pairs` do."""
    check_lm(lm, *features)
    return as_pairs(pairs)
