"""The location of a model's blocks, found from what the model declares and never guessed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.engines.transformers import compat
from trimtab.errors import TrimtabError, UnsupportedError


@dataclass(frozen=True)
class Layout:
    """The decoder (the module that runs the blocks), its blocks in order, and the width of the residual stream.

    `path` is the path of the list of blocks in the model; `context` is the maximum number of positions, `None` if there
    is no limit.
    """

    decoder: nn.Module
    blocks: tuple[nn.Module, ...]
    path: str
    width: int
    context: int | None

    @property
    def layers(self) -> int:
        return len(self.blocks)

    @property
    def heads(self) -> int | None:
        """The number of query heads per layer; `None` if the configuration doesn't give one for all layers."""
        return compat.query_heads(self.decoder.config)


def stream_dtype(layout: Layout) -> torch.dtype:
    """The dtype of the residual stream: that of the norms and embeddings, which aren't quantized.

    Raises:
        UnsupportedError: The model has no floating-point weights.
    """
    for parameter in layout.decoder.parameters():
        if parameter.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return parameter.dtype
    raise UnsupportedError("the model has no floating-point weights")


def check_wrapped(model: Any, tokenizer: Any) -> None:
    """Raise `TrimtabError`, naming what was passed, unless this is a transformers model and a tokenizer or `None`."""
    if isinstance(model, (str, Path)):
        raise TrimtabError(f"LM(model, tokenizer) wraps a loaded model; LM.load({str(model)!r}) loads one")
    if isinstance(tokenizer, nn.Module):
        raise TrimtabError("LM(model, tokenizer) takes the model first, and then its tokenizer")
    if isinstance(model, type):
        raise TrimtabError(
            f"LM(model, tokenizer) wraps a loaded model, and {model.__name__} is a class; LM.load loads one"
        )
    if not isinstance(model, nn.Module):
        inside = "; pass the model inside: LM(pipeline.model, pipeline.tokenizer)" if hasattr(model, "model") else ""
        raise TrimtabError(f"LM(model, tokenizer) wraps a transformers model, got {type(model).__name__}{inside}")
    if tokenizer is ...:
        raise TrimtabError("LM(model, tokenizer) needs the model's tokenizer as well")
    if tokenizer is not None and not callable(tokenizer):
        raise TrimtabError(
            "the tokenizer must be a transformers tokenizer, such as AutoTokenizer.from_pretrained(…) returns, got"
            f" {type(tokenizer).__name__}"
        )


def find_layout(model: Any, layers: str | None = None) -> Layout:
    """Find the layout of a causal language model, or of the language model inside a vision-language model.

    The blocks are the one `ModuleList` in the decoder that has as many items as the configuration declares hidden
    layers, all of the class that the model declares as the source of its hidden states. If the model declares no class,
    it is the one list of that length; if no list has that length (two layers per block), the one of that class.

    Args:
        model: The model.
        layers: A dotted path of the list, such as `"model.layers"`, that overrides the search.

    Raises:
        TrimtabError: No list or several lists qualify; the message names the candidates.
        UnsupportedError: This isn't a decoder-only transformers model.
    """
    if isinstance(getattr(model, "module", None), nn.Module) and not hasattr(model, "config"):
        kind = type(model).__name__
        raise UnsupportedError(f"{kind} runs copies of the model; pass the model inside: LM(model.module, tokenizer)")
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or not hasattr(model, "get_decoder"):
        raise UnsupportedError(
            f"{type(model).__name__} isn't a transformers model: it doesn't declare its blocks; pass the model inside"
            " it, which AutoModelForCausalLM.from_pretrained(…) returned"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{type(model).__name__} is an encoder-decoder; trimtab steers decoder-only models")
    text = config.get_text_config(decoder=True)
    said = model.get_decoder()
    said = said if hasattr(said, "config") else model  # some models return their head as the decoder
    path, blocks = _blocks_at(model, layers) if layers else _find_blocks(model, said, text.num_hidden_layers)
    decoder = _inner_decoder(model, path) if said is model else said
    return Layout(
        decoder=decoder,
        blocks=tuple(blocks),
        path=path,
        width=text.hidden_size,
        context=_context(text),
    )


def _context(text: Any) -> int | None:
    """The maximum number of positions in the configuration; `None` if it has none or it isn't positive."""
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _inner_decoder(model: nn.Module, path: str) -> nn.Module:
    """The innermost module around the blocks that takes token ids or embeddings.

    A model that returns itself as its decoder includes the language-model head.
    """
    parts = path.split(".")[:-1]
    for stop in range(len(parts), 0, -1):
        module = model.get_submodule(".".join(parts[:stop]))
        if {"input_ids", "inputs_embeds"} & set(compat.parameters(module)):
            return module
    return model


def _blocks_at(model: nn.Module, path: str) -> tuple[str, nn.ModuleList]:
    try:
        blocks = model.get_submodule(path)
    except AttributeError:
        raise TrimtabError(f"{type(model).__name__} has no {path!r}; its lists of blocks: {_names(model)}") from None
    if not isinstance(blocks, nn.ModuleList):
        raise TrimtabError(f"{path!r} is a {type(blocks).__name__}, not a list of blocks; lists: {_names(model)}")
    return path, blocks


def _find_blocks(model: nn.Module, decoder: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    lists = {name: m for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    block = compat.declared(decoder, "hidden_states")
    if block:
        every = {name: m for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        declared = {name: m for name, m in every.items() if all(isinstance(item, block) for item in m)}
        shorter = {name: m for name, m in declared.items() if len(m) < count and count % len(m) == 0}
        lists = {name: m for name, m in declared.items() if name in lists} or lists or shorter
    if len(lists) == 1:
        ((name, blocks),) = lists.items()
        prefix = next((n for n, m in model.named_modules() if m is decoder), "")
        return f"{prefix}.{name}".strip("."), blocks
    raise TrimtabError(
        f"can't tell which part of {type(model).__name__} holds its {count} blocks: {len(lists)} lists of that length"
        f" in its decoder; name it with layers=…; lists: {_names(model)}"
    )


def _names(model: nn.Module) -> str:
    lists = [f"{name} ({len(m)})" for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return ", ".join(lists[:8]) or "none"
