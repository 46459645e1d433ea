"""The identity of a model, as recorded in the cards of steerings that are learned on it."""

from __future__ import annotations

from typing import Any

from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.weights import blocks_digest, embedding_rows
from trimtab.steering.card import Adapter, ModelId
from trimtab.steering.identity import fingerprint, sampled_rows
from trimtab.text.chat import template_digest


def identify(model: Any, layout: Layout, tokenizer: Any, name: str, adapters: tuple[Adapter, ...]) -> ModelId:
    """The `ModelId` of a model with these active adapters.

    Raises:
        UnsupportedError: The values of its embeddings can't be read.
    """
    family = str(model.config.get_text_config(decoder=True).model_type)
    shape, rows = embedding_rows(model, sampled_rows)
    return ModelId(
        name=name,
        revision=getattr(model.config, "_commit_hash", None),
        family=family,
        width=layout.width,
        layers=layout.layers,
        fingerprint=fingerprint(family, shape, rows),
        template=template_digest(tokenizer),
        adapters=adapters,
        blocks=blocks_digest(layout.blocks),
    )
