"""What tests of decoding in batches share: steerings written short, requests run to their ends, a longer context."""

from __future__ import annotations

import copy
from typing import Any

import tiny
import torch

from trimtab import LM, Edit, Positions, Site, Steering
from trimtab.engines.transformers.batch_row import GenerationRequest, GenerationResponse


def steering(*edits: tuple[int, Any, Positions]) -> Steering:
    """Edits of the residual stream, each as its layer, operation and positions."""
    return Steering(tuple(Edit(Site(layer), operation, positions) for layer, operation, positions in edits))


def drain(batch: Any) -> dict[int, list[GenerationResponse]]:
    """All that a batch answers until it is empty, by row."""
    responses: dict[int, list[GenerationResponse]] = {}
    while len(batch):
        for response in batch.step():
            responses.setdefault(response.key, []).append(response)
    return responses


def run(batch: Any, *requests: GenerationRequest) -> list[list[GenerationResponse]]:
    """What these requests are answered, all in the batch together."""
    keys = [batch.insert(request) for request in requests]
    responses = drain(batch)
    assert [response.error for answer in responses.values() for response in answer if response.error] == []
    return [responses[key] for key in keys]


def long_llama() -> LM:
    """One whose context is longer than a chunk of a prompt."""
    lm = tiny.tiny("llama")
    config = copy.deepcopy(lm.model.config)
    config.max_position_embeddings = 1024
    torch.manual_seed(0)
    model = type(lm.model)(config).to(torch.float64).eval()
    model.generation_config.eos_token_id = None
    return LM(model, lm.tokenizer)
