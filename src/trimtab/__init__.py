"""trimtab steers language models: it edits their activations while they generate."""

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.lm import LM, DoseWarning, MismatchWarning
from trimtab.steering import (
    Ablate,
    Add,
    Always,
    Card,
    Edit,
    Gate,
    Operation,
    Positions,
    SetProjection,
    Site,
    Steering,
    Threshold,
)

__version__ = "0.1.0"

__all__ = [
    "LM",
    "Ablate",
    "Add",
    "Always",
    "Card",
    "DoseWarning",
    "Edit",
    "Gate",
    "MismatchWarning",
    "Operation",
    "Positions",
    "SetProjection",
    "Site",
    "Steering",
    "Threshold",
    "TrimtabError",
    "UnsupportedError",
]
