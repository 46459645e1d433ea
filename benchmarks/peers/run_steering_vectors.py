"""steering-vectors' mean difference, as a contender: read at the letter, the last token but one of `(A)`."""

from __future__ import annotations

from typing import Any

from steering_vectors import train_steering_vector
from worker import Directions, Extract, load_peer, serve


def prepare(job: dict[str, Any]) -> tuple[Any, Extract]:
    model, tokenizer = load_peer(job)
    samples = [tuple(texts) for texts in job["texts"]]

    def extract(request: dict[str, Any]) -> Directions:
        vector = train_steering_vector(
            model,
            tokenizer,
            samples[: request["pairs"]],
            layers=request["layers"],
            read_token_index=-2,
            batch_size=request["batch"],
        )
        return dict(vector.layer_activations)

    return model, extract


serve(prepare)
