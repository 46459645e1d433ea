"""repeng's control vector (PCA of the differences), as a contender: it reads the last token, so texts end there."""

from __future__ import annotations

from typing import Any

import torch
from repeng import ControlVector, DatasetEntry
from worker import Directions, Extract, load_peer, serve


def prepare(job: dict[str, Any]) -> tuple[Any, Extract]:
    model, tokenizer = load_peer(job)
    entries = [
        DatasetEntry(positive.removesuffix(")"), negative.removesuffix(")")) for positive, negative in job["texts"]
    ]

    def extract(request: dict[str, Any]) -> Directions:
        vector = ControlVector.train(
            model,
            tokenizer,
            entries[: request["pairs"]],
            hidden_layers=request["layers"],
            batch_size=request["batch"],
            method="pca_diff",
        )
        return {layer: torch.from_numpy(v) for layer, v in vector.directions.items()}

    return model, extract


serve(prepare)
