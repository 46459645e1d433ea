"""Steerings that come with the package: those that the demo shows on SmolLM2-135M-Instruct, learned by `learn_distill`.

`python -m benchmarks distill --seeds 1 --fits gradient --folder FOLDER` learns them again, under these names.
"""

from __future__ import annotations

from pathlib import Path


def path_of(name: str) -> Path:
    """The file of one of the demo's instructions."""
    return Path(__file__).parent / f"{name}-gradient-0.safetensors"
