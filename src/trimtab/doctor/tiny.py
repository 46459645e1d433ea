"""Tiny random models of every type that transformers knows, made from their configurations."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab.doctor.sizes import TEXT, VISION, VOCABULARY
from trimtab.doctor.structure import DROP, STRUCTURE, VARIANTS
from trimtab.engines.transformers import compat
from trimtab.errors import TrimtabError
from trimtab.lm import LM

CAUSAL = compat.CAUSAL
"""Model types with a causal language model, and the name of its class."""
IMAGE_TEXT = compat.IMAGE_TEXT
"""Image-text model types, of which only the language model is run."""
KEPT_OUT = ("A_log",)
"""Weights that keep their initial values, because they are logarithms."""
SPREAD = 0.15
GENERATION_SETTINGS = (
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "max_length",
    "min_length",
    "num_beams",
    "forced_decoder_ids",
)
"""Settings of `generate` that come with a model and would select other tokens than the likeliest."""


def tiny_lm(kind: str, *, vision: bool = False, flags: Mapping[str, Any] | None = None) -> LM:
    """A tiny random model of a type or variant (`"gemma4_text@shared"`), in float64 if transformers can run it so.

    Args:
        kind: The type, as in a configuration's `model_type`, or a variant of `VARIANTS`.
        vision: Build the image-text class; some types also have a causal one.
        flags: Configuration fields to set besides the sizes.

    Returns:
        The model, with a tokenizer whose words are `w3` … `w159`.

    Raises:
        TrimtabError: transformers has no such type, or it can't be made so small.
    """
    try:
        config = tiny_config(kind, flags or {})
        problem: Exception | None = None
        for dtype in (torch.float64, torch.float32):
            model = _build(kind, config, vision, dtype)
            try:
                _smoke_test(model)
                return LM(model, tokenizer(), name=f"tiny {kind}")
            except Exception as error:  # some kernels have no float64
                problem = error
        raise problem or TrimtabError(kind)
    except TrimtabError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise TrimtabError(f"can't make a tiny random {kind} that runs on text alone: {reason}") from error


def tiny_config(kind: str, flags: Mapping[str, Any]) -> Any:
    """The configuration of a tiny model of this type."""
    base = kind.split("@")[0]
    if base not in compat.CONFIGURATIONS:
        raise TrimtabError(f"transformers {transformers.__version__} has no model type {base!r}")
    overrides = {**STRUCTURE.get(base, {}), **VARIANTS.get(kind, {}), **flags}
    special_count = [0]
    config_class: Any = compat.CONFIGURATIONS[base]
    return config_class(**_fields(config_class, True, special_count, overrides))


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are `w3` … `w159`; it has no chat template."""
    special = {0: "<pad>", 2: "<unk>"}
    inner = Tokenizer(models.WordLevel({special.get(i, f"w{i}"): i for i in range(VOCABULARY)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")


def tiny_prompts() -> list[str]:
    """Three prompts of different lengths."""
    prompts = []
    for seed, length in enumerate((9, 5, 13)):
        generator = torch.Generator().manual_seed(seed)
        prompts.append(" ".join(f"w{i}" for i in torch.randint(5, 115, (length,), generator=generator).tolist()))
    return prompts


def _names(config_class: Any) -> dict[str, Any]:
    """The fields of a configuration and their defaults."""
    if dataclasses.is_dataclass(config_class):
        return {field.name: field.default for field in dataclasses.fields(config_class)}
    return {name: parameter.default for name, parameter in inspect.signature(config_class.__init__).parameters.items()}


def _fields(config_class: Any, text: bool, special_count: list[int], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for a tiny configuration of this class; `special_count` counts the special tokens assigned so
    far.
    """
    table = TEXT if text else VISION
    known, parts = _names(config_class), dict(getattr(config_class, "sub_configs", None) or {})
    fields: dict[str, Any] = {}
    for name in sorted(known):
        if name in parts or (name.endswith("softcapping") and known[name] is None):
            continue
        if name in table:
            fields[name] = table[name]
        elif name.endswith(("_token_id", "_token_index", "_patch_id", "_start_id", "_end_id", "_newline_id")):
            special_count[0] += 1
            fields[name] = VOCABULARY - 1 - special_count[0] % 30
    also = getattr(config_class, "attribute_map", {}) or {}
    fields = {name: value for name, value in fields.items() if also.get(name) not in fields}
    if text and "kv_lora_rank" in known and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = TEXT["num_attention_heads"]
    for name, part in parts.items():
        mine = overrides.get(name, {})
        if not hasattr(part, "sub_configs") or "Auto" in part.__name__:
            kind = mine.get("model_type") if isinstance(mine, dict) else None
            try:
                part = compat.CONFIGURATIONS[kind or getattr(config_class(), name).model_type]
            except Exception:  # its owner creates it from defaults
                continue
        of_text = any(word in name for word in ("text", "decoder", "llm", "language", "thinker"))
        fields[name] = _fields(part, of_text and "vision" not in name, special_count, mine)
        if getattr(part, "model_type", None):
            fields[name]["model_type"] = part.model_type
    for name, value in overrides.items():
        if isinstance(value, dict) and name in parts and isinstance(fields.get(name), dict):
            fields[name] = {**fields[name], **value}
        elif value is DROP:
            fields.pop(name, None)
        else:
            fields[name] = value
    return fields


def _build(kind: str, config: Any, vision: bool, dtype: torch.dtype) -> Any:
    base = kind.split("@")[0]
    names = IMAGE_TEXT if vision else CAUSAL
    if base not in names:
        raise TrimtabError(f"transformers has no {'image-text' if vision else 'causal language'} model for {base!r}")
    cls: Any = getattr(transformers, names[base])
    wanted = getattr(cls, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        inner = (getattr(config, part, None) for part in ("text_config", "decoder_config", "thinker_config", "decoder"))
        config = next((each for each in inner if isinstance(each, wanted)), config)
    torch.manual_seed(0)
    model = cls(config)
    if hasattr(model, "set_default_language"):
        model.set_default_language("en_XX")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.is_floating_point() or any(word in name for word in KEPT_OUT):
                continue
            if weight.dim() > 1:
                weight.normal_(0, SPREAD)
            elif not torch.isfinite(weight).all() or (weight.numel() > 1 and weight.abs().max() == 0):
                weight.normal_(0, 0.1)
        for buffer in model.buffers():
            if buffer.is_floating_point() and not torch.isfinite(buffer).all():
                buffer.zero_()
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        settings.eos_token_id = None
        for name in GENERATION_SETTINGS:
            if getattr(settings, name, None) is not None:
                setattr(settings, name, None)
    model = model.to(dtype).eval()
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        with suppress(Exception):
            model.set_experts_implementation("eager")  # the grouped kernels have no float64
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "attn_logit_softcapping", None) and compat.attention_name(model.config) == "sdpa":
        model.set_attn_implementation("eager")  # sdpa leaves out the soft cap
    return model


@torch.no_grad()
def _smoke_test(model: Any) -> None:
    """Run `generate` and a forward pass on text alone, to see them raise; `ValueError` if logits aren't finite."""
    ids = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8]])
    mask = (ids > 0).long()
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    output = model.generate(
        input_ids=ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options
    )
    if not all(math.isfinite(float(logits.abs().max())) for logits in output.logits):
        raise ValueError("its logits aren't finite")
    model(input_ids=ids[1:], attention_mask=mask[1:])
