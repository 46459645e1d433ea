"""The identity of an engine's model, as recorded in a steering's card, from the weights that the workers hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trimtab.engines.vllm.rpc import Rpc
from trimtab.steering import ModelId
from trimtab.steering.identity import fingerprint, sampled_rows
from trimtab.text.chat import template_digest


def identify(engine: Any, name: str | None = None) -> Rpc:
    """The `ModelId` of an engine's model, equal to `LM.identity`, from the embedding rows that each worker has."""
    config = engine.vllm_config.model_config
    text = config.hf_text_config
    family, shape = str(text.model_type), [text.vocab_size, text.hidden_size]
    rows = sampled_rows(text.vocab_size)
    workers = yield "trimtab_rows", (rows,)
    embeddings = {int(row): data for worker in workers for row, data in worker.items()}
    sample = torch.frombuffer(bytearray(b"".join(embeddings[row] for row in rows)), dtype=torch.bfloat16)
    return ModelId(
        name=_label(config.model) if name is None else name,
        revision=getattr(config.hf_config, "_commit_hash", None),
        family=family,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        fingerprint=fingerprint(family, shape, sample.view(len(rows), -1)),
        template=template_digest(engine.get_tokenizer()),
    )


def _label(name: str) -> str:
    path = Path(name)
    return path.resolve().name if path.is_dir() else name
