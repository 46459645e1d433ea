"""Checks that a steering's gates fit a model: their sites exist, and have the width of their directions."""

from __future__ import annotations

from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.places import place
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Steering
from trimtab.steering.gates import thresholds


def check_gates(steering: Steering, layout: Layout) -> None:
    """Raises `TrimtabError` unless every gate fits the model, and conditions on each token are at their edit's site."""
    for edit in steering.edits:
        for test in thresholds(edit.gate):
            if test.site.kind == "scores":
                raise UnsupportedError("attention scores are steered, not read; a gate reads activations")
            size = place(layout, test.site).size
            if test.direction.shape[0] != size:
                raise TrimtabError(
                    f"a gate's width at {test.site} is {test.direction.shape[0]}, this model's is {size}"
                )
        for site in edit.gate.token_sites:
            if site != edit.site or site.kind == "scores":
                raise TrimtabError(
                    f"a condition on each token must read the site of its edit: this one reads {site}, and its edit is"
                    f" at {edit.site}"
                )
