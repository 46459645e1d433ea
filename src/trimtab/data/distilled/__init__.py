"""Steerings that come with the package: what the demo shows of the default model, learned by `learn_distill`.

`python -m benchmarks distill --shipped` learns them again.
"""

from __future__ import annotations

from pathlib import Path


def path_of(name: str) -> Path:
    """The file of one of the demo's instructions, for SmolLM2-135M-Instruct."""
    return Path(__file__).parent / f"{name}.safetensors"
