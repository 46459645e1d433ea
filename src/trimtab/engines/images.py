"""The output of an image processor for a prompt's images: additional model inputs for the prefill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

BY_TOKEN = ("token_type_ids",)
"""Suffixes of the names of inputs that have one column per token."""


@dataclass(frozen=True, eq=False)
class PromptImages:
    """The images of one prompt, whose token ids contain their placeholders.

    Attributes:
        inputs: By name, for one row: pixels, sizes, and any other outputs of the processor that the model takes.
        count: The number of images.
    """

    inputs: Mapping[str, Any]
    count: int

    def until(self, stop: int) -> dict[str, Any]:
        """The inputs for a pass over the first `stop` tokens, which contain all the images' placeholders."""
        return {
            name: value[:, :stop] if name.endswith(BY_TOKEN) and isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
