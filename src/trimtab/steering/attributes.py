"""Errors for attribute names of other libraries, which say what trimtab has instead.

They are also `AttributeError`s, so that `hasattr` and `getattr` with a default still work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.errors import TrimtabError

HIDDEN = "lm.capture(prompts, [10, 14]) gives activations, residual streams by default"
STEERS = "to steer, use lm.generate(prompts, steering), or call the model inside `with lm.steered(steering):`"
OF_MODEL = "it belongs to the model: lm.model.{name}"
LM_HINTS: Mapping[str, str] = {
    **dict.fromkeys(("config", "eval", "train", "parameters", "state_dict", "forward", "generation_config"), OF_MODEL),
    **dict.fromkeys(("to", "cuda", "cpu", "half", "float", "bfloat16", "compile", "requires_grad_"), OF_MODEL),
    **dict.fromkeys(("device", "dtype"), "see lm.runs_in; the model itself is lm.model"),
    **dict.fromkeys(("decode", "batch_decode", "chat_template"), "it belongs to the tokenizer: lm.tokenizer.{name}"),
    **dict.fromkeys(("tokenize", "to_tokens"), "lm.encode(prompt) gives a prompt's tokens"),
    **dict.fromkeys(("num_layers", "n_layers", "num_hidden_layers"), "it is lm.layout.layers"),
    **dict.fromkeys(("hidden_size", "d_model", "width"), "it is lm.layout.width"),
    **dict.fromkeys(("layers", "blocks"), "the blocks are lm.layout.blocks, their number is lm.layout.layers"),
    **dict.fromkeys(
        ("cfg", "context"), "lm.layout has layers, width and context; the model's settings are lm.model.config"
    ),
    **dict.fromkeys(("run_with_cache", "trace", "hidden_states", "get_activations", "get_hidden_states"), HIDDEN),
    **dict.fromkeys(("run_with_hooks", "add_hook", "set_control", "steer", "apply", "add_steering", "hook"), STEERS),
    **dict.fromkeys(
        ("reset", "remove_hooks", "reset_hooks", "unload"),
        "no hooks stay on the model after an answer, so there is nothing to remove",
    ),
    **dict.fromkeys(
        ("chat", "generate_text", "create_completion"), "use lm.generate, or lm.stream to get the answer in pieces"
    ),
    **dict.fromkeys(
        ("logits", "get_logits"),
        "lm.next_logprobs scores candidates for the next token; for all logits call lm.model(…)",
    ),
    "from_pretrained": "it is LM.load(…), or LM(model, tokenizer)",
    "save": "save the steering with steering.save(path); bake writes a model",
    "model_name": "it is lm.name",
}
"""The hint for each attribute name, for an `LM`."""

ONE_EDIT = "each of steering.edits has its own {name}"
STEERING_HINTS: Mapping[str, str] = {
    **dict.fromkeys(("strength", "site", "positions", "gate", "operation"), ONE_EDIT),
    **dict.fromkeys(("scale", "multiplier", "coeff", "coefficient"), "a strength multiplies it: 2 * steering"),
    **dict.fromkeys(
        ("vector", "vectors", "directions", "layer_activations"), "steering.direction(14) is the direction at layer 14"
    ),
    "layer": "it is steering.layers",
    **dict.fromkeys(("apply", "patch_activations", "steer", "generate"), STEERS),
    **dict.fromkeys(("to", "cuda", "cpu", "half"), "it moves to the model's device automatically"),
    **dict.fromkeys(
        ("export", "export_gguf", "save_gguf"), "trimtab.export(steering, path) writes files for other programs"
    ),
    "save_pretrained": "it is steering.save(path)",
    "norm": "steering.plot() and its table in a notebook show the norms of its edits",
}
"""The same for a `Steering`."""

ANSWER_HINTS: Mapping[str, str] = {
    **dict.fromkeys(("dose", "doses", "edits"), "it is answer.applied.{name}"),
    "tokens": "their ids are answer.token_ids",
    **dict.fromkeys(("generated_text", "outputs", "content", "message", "response"), "it is answer.text"),
    **dict.fromkeys(
        ("strip", "lower", "upper", "split", "startswith", "endswith", "replace"), "it is answer.text.{name}"
    ),
}
"""The same for an answer of `lm.generate`."""


class MissingAttribute(TrimtabError, AttributeError):
    """A missing attribute for which there is a hint."""


def raise_missing_attribute(thing: Any, kind: str, name: str, hints: Mapping[str, str]) -> Any:
    """Implements `__getattr__`: raises `MissingAttribute` or `AttributeError`, or a property's own error again."""
    if name in hints and not hasattr(type(thing), name):
        raise MissingAttribute(f"{kind} has no {name!r}: {hints[name].format(name=name)}")
    return object.__getattribute__(thing, name)
