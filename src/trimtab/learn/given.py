"""What the functions that learn are given: a model, and pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from trimtab.engines.transformers.exclusive import steered_here
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.text.pairs import Pair, Pairs, as_pairs


def check_lm(lm: Any) -> None:
    """Raises `TrimtabError` unless this is an `LM` to learn with, saying what to give instead.

    Its activations can be read here, and nothing steers them: what is learned inside `lm.steered(…)`, of this `LM` or
    another over the same model, would be about another model.
    """
    if isinstance(lm, nn.Module):
        raise TrimtabError(
            f"a steering is learned with the LM, and this is a model ({type(lm).__name__}): give lm where you gave"
            " lm.model, or LM(model, tokenizer)"
        )
    if isinstance(lm, (str, Path)):
        raise TrimtabError(f"a steering is learned with an LM, got {str(lm)!r}: give LM.load({str(lm)!r})")
    if not hasattr(lm, "capture"):
        raise TrimtabError(f"a steering is learned with an LM, got {type(lm).__name__}: give LM.load(…) first")
    if not hasattr(lm, "layout"):
        raise UnsupportedError(
            f"{type(lm).__name__} runs steerings, and can't learn them; load the model without engine= for that"
        )
    if steered_here(lm.layout.decoder):
        raise TrimtabError(
            "this model is being steered, so that what is learned now would be learned from steered activations; leave"
            " lm.steered(…) first"
        )


def pairs_for(lm: Any, pairs: Pairs) -> list[Pair]:
    """The pairs that a model is to learn from. Raises `TrimtabError` as `check_lm` and `as_pairs` do."""
    check_lm(lm)
    return as_pairs(pairs)
