"""What an image processor has made of a prompt's images: further inputs of the model's pass over that prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

BY_TOKEN = ("token_type_ids",)
"""How the names end of inputs that have a column a token."""


@dataclass(frozen=True, eq=False)
class PromptImages:
    """The images of one prompt, whose token ids hold their places.

    Attributes:
        inputs: By name, for one row: pixels, sizes, and what else of its processor's the model takes.
        count: How many images they are.
    """

    inputs: Mapping[str, Any]
    count: int

    def until(self, stop: int) -> dict[str, Any]:
        """The inputs of a pass over the first so many tokens, which hold all images' places."""
        return {
            name: value[:, :stop] if name.endswith(BY_TOKEN) and isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
