"""All names from transformers that may change between releases, in one place, and the supported releases.

transformers renames undocumented parameters: 5.24 calls the decoder's `past_key_values` `cache`. So nothing here relies
on one spelling: a cache is recognized by its interface, and passed under the name that the model declares. What can't
be found raises `UnsupportedError`; it is never treated as absent.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import cached_property, lru_cache
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import MaxTimeCriteria, StopStringCriteria
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils.chat_template_utils import render_jinja_template

from trimtab.errors import TrimtabError, UnsupportedError, UntestedVersionWarning

STATE_LAYER: Any = getattr(cache_utils, "LinearAttentionLayer", None)
KEYS_AND_STATE: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)
_NOTHING: Any = getattr(cache_utils, "DummyLayer", None)
"""The classes of cache layers that hold a recurrent state, or nothing; `None` in releases that don't have them."""

__all__ = [
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LogitsProcessor",
    "sdpa_mask",
]  # re-exported unchanged

OLDEST = "5.16"
"""The oldest supported release of transformers."""
NEWEST = "5.24"
"""The newest minor release of transformers on which the whole test suite has passed."""

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""The names that model families use for the cache parameter, newest first."""


def check_version(installed: str | None = None) -> None:
    """Check the installed transformers against the range of supported releases.

    Args:
        installed: The version to check; default: the imported one.

    Raises:
        TrimtabError: It is older than `OLDEST`.

    Warns:
        UntestedVersionWarning: It is newer than `NEWEST`; once per process.
    """
    version = Version(transformers.__version__ if installed is None else installed)
    if version.release[:2] < Version(OLDEST).release:
        raise TrimtabError(
            f"transformers {version} is too old: trimtab needs {OLDEST} or newer."
            " Run: pip install --upgrade transformers"
        )
    if version.release[:2] > Version(NEWEST).release:
        _warn_untested(str(version))


@lru_cache
def _warn_untested(version: str) -> None:
    warnings.warn(
        f"transformers {version} is newer than {NEWEST}, the newest release that trimtab's tests have passed on."
        " trimtab checks at every step that its edits act, and raises an error where they don't. For the release that"
        f" was tested, run: pip install 'transformers=={NEWEST}.*'",
        UntestedVersionWarning,
        stacklevel=5,
    )


# ---- the parameters of a forward pass --------------------------------------------------------------------------


def unwrap_model(model: Any) -> Any:
    """The transformers model itself, without a wrapper of PEFT or `torch.compile`."""
    if isinstance(model, PreTrainedModel) or not isinstance(model, nn.Module):
        return model
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def parameters(module: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a module's `forward`, without `self`; for a wrapper, those of the model inside."""
    kind: Any = type(unwrap_model(module))
    return _parameters(kind)


@lru_cache(maxsize=64)
def _parameters(kind: Any) -> Mapping[str, inspect.Parameter]:
    signature = dict(inspect.signature(kind.forward).parameters)
    signature.pop("self", None)
    return signature


def bind_arguments(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the module, by name."""
    return {**dict(zip(parameters(module), args, strict=False)), **kwargs}


# ---- caches ----------------------------------------------------------------------------------------------------

_PLAIN = (type(None), bool, int, float, str, Tensor, list, tuple, Mapping, torch.dtype, torch.device, Enum)


def is_cache(value: Any) -> bool:
    """Whether this is a cache: transformers' `Cache`, or an object with a `get_seq_length` method."""
    return isinstance(value, Cache) or (
        not isinstance(value, _PLAIN) and callable(getattr(value, "get_seq_length", None))
    )


def cache_of(arguments: Mapping[str, Any], owner: str) -> Any:
    """The cache among the arguments of a forward pass, under any name; `None` if there is none.

    Args:
        arguments: The arguments by name (see `bind_arguments`).
        owner: The name of the module, for the error message.

    Raises:
        UnsupportedError: There is an unknown object that may hold the past, or there are several caches.
    """
    caches = {id(value): value for value in arguments.values() if is_cache(value)}
    if len(caches) > 1:
        raise UnsupportedError(f"{owner} was given {len(caches)} caches; trimtab can't tell which one is the text's")
    if caches:
        return next(iter(caches.values()))
    for name, value in arguments.items():
        if value is None or (isinstance(value, _PLAIN) and name not in CACHE_NAMES) or callable(value):
            continue
        if type(value).__module__.split(".")[0] == "torch":  # a BlockMask, say
            continue
        raise UnsupportedError(
            f"{owner} was given {name}, a {type(value).__name__}, which trimtab doesn't know: it may keep the text's"
            " past, and then no token's position can be determined. Pass a transformers Cache, or none"
        )
    return None


def past_length(cache: Any) -> int | None:
    """The number of tokens in a cache; `None` if it holds only a state of an unknown number of tokens (Mamba).

    Raises:
        UnsupportedError: The cache doesn't say whether it holds any tokens.
    """
    try:
        return int(cache.get_seq_length())
    except ValueError:
        pass
    try:
        return None if cache.has_previous_state() else 0
    except (ValueError, AttributeError, TypeError) as error:
        raise UnsupportedError(
            f"{type(cache).__name__} doesn't say how many tokens it holds, so no token's position can be determined"
        ) from error


@lru_cache(maxsize=64)
def _cache_name(kind: Any) -> str | None:
    known = _parameters(kind)
    for name in CACHE_NAMES:
        if name in known:
            return name
    annotated = [name for name, parameter in known.items() if "Cache" in str(parameter.annotation)]
    return annotated[0] if len(annotated) == 1 else None


def cache_name(module: Any) -> str:
    """The name of the cache parameter of the module's `forward`.

    Raises:
        UnsupportedError: It declares no known cache parameter.
    """
    kind: Any = type(unwrap_model(module))
    name = _cache_name(kind)
    if name is None:
        raise UnsupportedError(
            f"{type(module).__name__} declares no parameter for a cache that trimtab knows; it takes"
            f" {', '.join(parameters(module))}"
        )
    return name


def check_common_cache(decoder: Any) -> None:
    """Raises `UnsupportedError` for a decoder that takes no cache, or declares its own cache class (MiniMax)."""
    declared_as = str(parameters(decoder)[cache_name(decoder)].annotation)
    own = [name for name in re.findall(r"\w*Cache\b", declared_as) if not hasattr(cache_utils, name)]
    if own:
        raise UnsupportedError(f"{type(decoder).__name__} needs its own cache class, {own[0]}")


def with_cache(module: Any, inputs: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The inputs of a pass of `module`, with this cache added."""
    return {**inputs, cache_name(module): cache}


def without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a pass, without a cache."""
    return {name: value for name, value in kwargs.items() if not is_cache(value) and name != "use_cache"}


def new_cache(config: Any) -> Any:
    """An empty cache of the type that a model with this configuration needs."""
    return DynamicCache(config=config)


def snapshot_cache(cache: Any) -> Any:
    """A snapshot of the cache, which later passes over `cache` don't change.

    Layers of plain keys and values grow by replacing their tensors, not by modifying them, so those aren't copied.
    """
    if not isinstance(getattr(cache, "layers", None), list):
        return copy.deepcopy(cache)
    aside = copy.copy(cache)
    aside.layers = [copy.copy(layer) if type(layer) in _REPLACED else copy.deepcopy(layer) for layer in cache.layers]
    return aside


def fork(cache: Any, rows: Tensor) -> Any:
    """An independent cache with these rows `[rows]` of another; rows may be repeated.

    Raises:
        UnsupportedError: Rows of this cache can't be selected.
    """
    if not callable(getattr(cache, "reorder_cache", None)):
        raise UnsupportedError(f"{type(cache).__name__} doesn't support reorder_cache, which rejection needs")
    forked = snapshot_cache(cache)
    forked.reorder_cache(rows)
    return forked


_REPLACED = (DynamicLayer, DynamicSlidingWindowLayer)


def keeps_plain_cache(decoder: Any) -> bool:
    """Whether all layers cache plain keys and values (with or without a sliding window), so that rows can be repeated.

    Raises:
        UnsupportedError: The decoder declares no known cache parameter.
    """
    if getattr(decoder, "_is_stateful", False):
        return False
    layers = DynamicCache(config=decoder.config).layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return False
    cache_name(decoder)
    return True


def whole_cache(config: Any) -> Any:
    """An empty cache for a model with this configuration that keeps all tokens, also in layers with a sliding window.

    Raises:
        UnsupportedError: A layer caches something other than keys and values or a recurrent state.
    """
    cache = DynamicCache(config=config)
    cache.layers = [_whole(layer) for layer in cache.layers]
    return cache


def _whole(layer: Any) -> Any:
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return DynamicLayer()
    if type(layer) is _NOTHING:
        return layer
    if keeps_state(layer) and type(layer).__module__ == DynamicLayer.__module__:
        states = layer.number_of_states
        return KEYS_AND_STATE(states) if isinstance(layer, DynamicLayer) else STATE_LAYER(states)
    raise UnsupportedError(f"the cache has a {type(layer).__name__}, whose rows can't be split")


def keeps_state(layer: Any) -> bool:
    """Whether a cache layer holds a recurrent state, with or without keys and values."""
    return STATE_LAYER is not None and isinstance(layer, STATE_LAYER)


def is_state_alone(cache: Any) -> bool:
    """Whether a cache holds recurrent states and no keys, so that it has no columns to mask."""
    layers = list(getattr(cache, "layers", ()))
    return any(map(keeps_state, layers)) and not any(hasattr(layer, "keys") for layer in layers)


STATES = ("conv_states", "recurrent_states")
"""The attributes with a layer's states: dictionaries of tensors or `None`. The first axis of a tensor is the rows."""
STATE_FLAGS = (
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "conv_kernel_size",
)
"""The attributes with a layer's information about each of its states."""


def grows_plainly(cache: Any) -> bool:
    """Whether every layer holds plain keys and values without a window, and grows by one column per token."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


# ---- what a model declares -------------------------------------------------------------------------------------


def declared(decoder: Any, output: str) -> tuple[type, ...]:
    """The module classes that the decoder declares as sources of an output: `"hidden_states"` or `"attentions"`."""
    outputs = (getattr(type(decoder), "_can_record_outputs", None) or {}).get(output)
    listed = [
        getattr(entry, "target_class", entry)
        for entry in (outputs if isinstance(outputs, (list, tuple)) else [outputs])
    ]
    return tuple(kind for kind in listed if isinstance(kind, type))


def declared_name(decoder: Any, output: str) -> str | None:
    """The name, within a block, of the module that the decoder declares as the source of an output; `None` if none."""
    outputs = (getattr(type(decoder), "_can_record_outputs", None) or {}).get(output)
    return getattr(outputs, "layer_name", None)


def active_stream(config: Any) -> int | None:
    """The index of the residual stream that blocks read, among several, if the configuration declares one (AltUp)."""
    index = getattr(config, "altup_active_idx", None)
    return index if isinstance(index, int) else None


def query_heads(config: Any) -> int | None:
    """The number of query heads per layer; `None` if it differs between layers, or there are none."""
    try:
        counts = {getattr(config, "num_attention_heads", None)}
    except RuntimeError:  # the configuration differs per layer
        own = config.per_layer_config
        each = own.values() if isinstance(own, Mapping) else own
        counts = {getattr(layer_config, "num_attention_heads", None) for layer_config in each}
    (count,) = counts if len(counts) == 1 else (None,)
    return int(count) if count else None


CONFIGURATIONS: Any = CONFIG_MAPPING
"""The configuration class by model type."""
CAUSAL: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""The class name of the causal language model by model type."""
IMAGE_TEXT: dict[str, str] = dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
"""The class name of the image-text model by model type."""


def takes_images(model: Any) -> bool:
    """Whether a model's `forward` takes pixel values."""
    return any("pixel" in name for name in parameters(model))


def auto_processor(source: str, **options: Any) -> Any:
    """The processor of a model, given as a Hub id or folder."""
    return transformers.AutoProcessor.from_pretrained(source, **options)


def is_causal_lm(config: Any) -> bool:
    """Whether transformers has a causal language model for this configuration."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


# ---- the attention interface -----------------------------------------------------------------------------------


def calls_attention_interface(module: nn.Module) -> bool:
    """Whether the module's code looks up its attention function in transformers' table."""
    kind: Any = type(module)
    return _looks_up(kind)


@lru_cache(maxsize=256)
def _looks_up(kind: type[nn.Module]) -> bool:
    functions = [
        f for base in kind.__mro__ if base is not nn.Module for f in vars(base).values() if inspect.isfunction(f)
    ]
    return any(_INTERFACE in inspect.unwrap(function).__code__.co_names for function in functions)


_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""The name of the table of attention functions in transformers' modules."""


def attention_name(config: Any) -> str:
    """The name of the attention implementation in a configuration: `"sdpa"`, `"eager"` …"""
    return str(config._attn_implementation)


def attention_function(name: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function of that name, as this module would look it up."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise UnsupportedError(f"{type(module).__name__} has no eager attention function to fall back on")
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def is_cross_attention(module: nn.Module) -> bool:
    """Whether this is cross-attention to the states of an image or encoder, rather than attention to the text."""
    kind: Any = type(module)
    return any(name.startswith("cross_attention") for name in _parameters(kind))


def attention_parameters(module: nn.Module) -> frozenset[str]:
    """The parameters of the eager attention in the module's own file, which also apply to its other implementations."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return frozenset() if eager is None else _named(eager)


@lru_cache
def _named(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def sdpa_attention() -> Callable[..., Any]:
    """The attention function named `"sdpa"`."""
    return ALL_ATTENTION_FUNCTIONS["sdpa"]


def mask_function(name: str) -> Callable[..., Any]:
    """The mask function for the attention of that name."""
    return ALL_MASK_ATTENTION_FUNCTIONS[name]


@contextmanager
def registered_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    """Register an attention function and its mask function with transformers, while the context is open."""
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)


@contextmanager
def with_attention_implementation(configs: Sequence[Any], name: str) -> Iterator[None]:
    """Set the attention implementation of these configurations, while the context is open."""
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation = old


# ---- generate ---------------------------------------------------------------------------------------------------


def generation_option(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """The effective value of an option of `generate`: the requested one, else that of the model's generation config."""
    value = options.get(name)
    return value if value is not None else getattr(model.generation_config, name, None)


_UNSUPPORTED_SETTINGS = (
    "stop_strings",
    "max_time",
    "penalty_alpha",
    "dola_layers",
    "guidance_scale",
    "prompt_lookup_num_tokens",
    "watermarking_config",
    "num_return_sequences",
    "token_healing",
)
"""Settings that have no effect only if they are unset (or 1)."""


def decodes_by_steps(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether `generate` would decode one token per pass, greedily or by sampling, over a growing cache.

    Args:
        model: The model; its own generation settings apply unless `options` override them.
        options: Options of `generate` that affect how tokens are chosen.
    """
    inside = unwrap_model(model)
    if type(inside).generate is not GenerationMixin.generate or "generate" in vars(model):
        return False
    config, _ = inside._prepare_generation_config(None, **options)
    if str(config.get_generation_mode().value) not in ("greedy_search", "sample") or config.use_cache is False:
        return False
    if any(getattr(config, name, None) not in (None, 1, False) for name in _UNSUPPORTED_SETTINGS):
        return False
    return not _may_recompute_cache(inside)


def _may_recompute_cache(model: Any) -> bool:
    """Whether rotary embeddings depend on the text's length, so that the cache of a long text may be recomputed."""
    text = model.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    each = [rope, *(settings for settings in rope.values() if isinstance(settings, Mapping))]
    return any(settings.get("rope_type", settings.get("type")) in ("longrope", "dynamic") for settings in each)


def is_generate_option(model: Any, name: str) -> bool:
    """Whether transformers' `generate` accepts this name: a setting, an argument, or an input of the model."""
    if hasattr(model.generation_config, name) or name in ("tokenizer", "assistant_tokenizer", *CACHE_NAMES):
        return True
    inside = unwrap_model(model)
    own = inspect.signature(inside.generate).parameters
    return (
        name in own
        or name in parameters(model)
        or name in inspect.signature(inside.prepare_inputs_for_generation).parameters
    )


PROCESSING = ("logits_processor", "prefix_allowed_tokens_fn")
"""Arguments of `generate`, not settings, that affect how tokens are chosen."""


def logits_processors(model: Any, options: Mapping[str, Any], prompt_length: int, device: torch.device) -> Any:
    """The logits processors that `generate` would use with these options and the model's own settings."""
    own = {name: options[name] for name in PROCESSING if options.get(name) is not None}
    config, _ = model._prepare_generation_config(None, **{n: v for n, v in options.items() if n not in PROCESSING})
    model._prepare_special_tokens(config, True, device=device)
    return model._get_logits_processor(config, input_ids_seq_length=prompt_length, device=device, **own)


class StopStrings:
    """The stop strings of `generate`, tested for all rows of a batch at once.

    Args:
        tokenizer: The tokenizer of the answers.
        stop_strings: A string or several.
    """

    _NO_TOKEN = torch.iinfo(torch.long).max  # ids outside the vocabulary match nothing

    def __init__(self, tokenizer: Any, stop_strings: Any) -> None:
        self._arguments = tokenizer, stop_strings

    @cached_property
    def _criterion(self) -> Any:
        """Built when it is needed, since that goes through the whole vocabulary."""
        return StopStringCriteria(*self._arguments)

    def ended(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[bool]:
        """Whether each text, the ids of a prompt and of its answer, ends in a token that completes a stop string."""
        if not texts:
            return []
        length = int(self._criterion.maximum_token_len)
        ids = torch.full((len(texts), length), self._NO_TOKEN)
        for row, (prompt, answer) in enumerate(texts):
            tail = list(answer[-length:])
            tail = [*prompt[max(0, len(prompt) + len(tail) - length) :], *tail]
            ids[row, length - len(tail) :] = torch.tensor(tail)
        ended: list[bool] = self._criterion(ids, None).tolist()
        return ended


def stopping_criteria(options: Mapping[str, Any]) -> list[Any]:
    """The stopping criteria for these options of `generate`, apart from end tokens, stop strings and the maximum
    length.
    """
    criteria = list(options.get("stopping_criteria") or ())
    if options.get("max_time") is not None:
        criteria.append(MaxTimeCriteria(options["max_time"]))
    return criteria


_KNOWN_PROCESSORS: dict[type, tuple[str, str]] = {
    RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty"),
    MinNewTokensLengthLogitsProcessor: ("min_new_tokens", "min_new_tokens"),
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
}
"""Processors with one parameter: the setting of `generate`, and their attribute. In the order that `generate` applies
them."""


def processor_settings(processors: Sequence[Any]) -> dict[str, Any] | None:
    """These processors as settings of `generate`; `None` if any of them isn't known, or they are in another order.

    `min_new_tokens` comes with `ends`, the end tokens that it suppresses.
    """
    settings: dict[str, Any] = {}
    order, kinds = list(_KNOWN_PROCESSORS), [type(processor) for processor in processors]
    if any(kind not in order for kind in kinds):
        return None
    places = [order.index(kind) for kind in kinds]
    if sorted(set(places)) != places:
        return None
    for processor in processors:
        name, attribute = _KNOWN_PROCESSORS[type(processor)]
        value = getattr(processor, attribute, None)
        if value is None or getattr(processor, "prompt_ignore_length", None) is not None:
            return None
        if (
            getattr(processor, "min_tokens_to_keep", 1) != 1
            or getattr(processor, "filter_value", -torch.inf) != -torch.inf
        ):
            return None
        settings[name] = value
        if name == "min_new_tokens":
            settings["ends"] = tuple(torch.as_tensor(processor.eos_token_id).flatten().tolist())
    return settings


def render_chat_template(messages: Sequence[Any], template: str | None, **variables: Any) -> str:
    """One conversation, rendered with a Jinja chat template and these variables."""
    rendered: Any = render_jinja_template(conversations=[list(messages)], chat_template=template, **variables)
    return str(rendered[0][0])  # the result is a pair: texts, and spans in them
