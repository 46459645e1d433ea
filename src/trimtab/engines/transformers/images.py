"""Prompts with images: rendered by the model's processor, and prefilled in a forward pass that gets the pixels.

In the token ids each image has one placeholder token per feature, so token positions are the columns that the model
computes. Only the prefill gets the pixels; decoding continues from its KV cache. The position ids of generated tokens
follow from the prefill's, because in some models an image takes up fewer positions than tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.engines.images import BY_TOKEN, PromptImages
from trimtab.engines.resolve import PositionsByRequest, ReadActivations
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.anatomy import COARSE, TOLERANCES
from trimtab.engines.transformers.exclusive import reading
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.passes import last_logits
from trimtab.engines.transformers.read import check_read, recording
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Site
from trimtab.text.chat import Template, checked_messages, has_template, rendering_keywords, requires_parts
from trimtab.text.images import IMAGE_LIMITS, ImageLimits, load_images
from trimtab.text.spans import Span, find_spans_with_images
from trimtab.text.templates import preset_keywords

AXES = 3
"""The number of axes of multimodal position ids (time, height, width). An additional first axis counts tokens."""


def encode_with_images(
    processor: Any,
    tokenizer: Any,
    model: Any,
    prompt: Sequence[Mapping[str, Any]],
    *,
    system: str | None,
    template: Template | None,
    bounds: ImageLimits = IMAGE_LIMITS,
) -> tuple[list[int], PromptImages]:
    """The token ids of messages with images, with placeholder tokens for each image, and the image inputs of the model.

    Raises:
        TrimtabError: Messages or images can't be read, or the processor rejects them.
        UnsupportedError: The processor returns inputs that the model doesn't take.
    """
    messages = load_images(checked_messages(prompt, system), bounds)
    tokenizer = with_template(tokenizer, processor)
    if requires_parts(tokenizer):
        messages = [_in_parts(message) for message in messages]
    count = sum(
        part["type"] == "image"
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
    )
    keywords = {**preset_keywords(tokenizer), **rendering_keywords(tokenizer, messages, template)}
    how: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    try:
        encoded = processor.apply_chat_template([dict(message) for message in messages], **how, **keywords)
    except Exception as error:  # templates and processors may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise TrimtabError(f"the model's processor refuses these messages: {reason}") from error
    ids = encoded["input_ids"]
    if len(ids) != 1 or not bool(torch.as_tensor(encoded["attention_mask"]).all()):
        raise TrimtabError("the model's processor returned several rows, or a padded one, for one prompt")
    return torch.as_tensor(ids)[0].tolist(), PromptImages(_inputs(model, encoded), count)


def with_template(tokenizer: Any, processor: Any) -> Any:
    """The tokenizer, with the processor's chat template if it has none. Raises `TrimtabError` if neither has one."""
    if has_template(tokenizer):
        return tokenizer
    if not getattr(processor, "chat_template", None):
        raise TrimtabError(
            "this model's processor has no chat template, so the position of an image can't be determined"
        )
    other = copy.copy(tokenizer)
    other.chat_template = processor.chat_template
    return other


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


def _inputs(model: Any, encoded: Mapping[str, Any]) -> dict[str, Any]:
    """The image inputs in a processor's output, on the model's input device and in its dtype."""
    takes, device = compat.parameters(model), input_device(model)
    inputs: dict[str, Any] = {}
    for name, value in encoded.items():
        if name in ("input_ids", "attention_mask") or value is None:
            continue
        if name not in takes:
            if name.endswith(BY_TOKEN):
                continue
            raise UnsupportedError(
                f"{type(model).__name__} doesn't take {name}, which its processor returns for an image; this processor"
                " belongs to another model"
            )
        if isinstance(value, Tensor):
            value = value.to(device=device, dtype=model.dtype if value.is_floating_point() else None)
        inputs[name] = value
    if not any("pixel" in name or "image" in name for name in inputs):
        raise TrimtabError(
            "the model's processor returned no pixel values for these images; its chat template leaves them out"
        )
    return inputs


class PositionShift:
    """The position ids that the decoder got in a prefill.

    `shift` is the position id of the next token minus the number of tokens before it: 0 without images.
    """

    shift = 0


@contextmanager
def recording_positions(layout: Layout, tokens: int | None) -> Iterator[PositionShift]:
    """Record the position ids of one forward pass over the first `tokens` tokens of a prompt.

    `None` allows several passes and records nothing.

    Raises:
        UnsupportedError: The decoder computes a different number of tokens than the prompt has.
        TrimtabError: The model can't process the images.
    """
    counted, owner = PositionShift(), get_ident()

    def look(decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        if tokens is None or get_ident() != owner:
            return
        arguments = compat.bind_arguments(decoder, args, kwargs)
        entering = arguments.get("inputs_embeds") if arguments.get("input_ids") is None else arguments["input_ids"]
        if isinstance(entering, Tensor) and entering.shape[1] != tokens:
            raise UnsupportedError(
                f"{type(decoder).__name__} computes {entering.shape[1]} tokens for a prompt of {tokens}: it inserts"
                " images next to the text, so the positions of its tokens can't be determined"
            )
        positions = arguments.get("position_ids")
        if isinstance(positions, Tensor):
            axes = positions[-AXES:] if positions.dim() == 3 else positions
            counted.shift = int(axes.max()) + 1 - tokens

    try:
        with layout.decoder.register_forward_pre_hook(look, with_kwargs=True):
            yield counted
    except (TrimtabError, RuntimeError):
        raise
    except Exception as error:  # models may raise anything for images that they can't process
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise TrimtabError(f"the model can't read this prompt's images: {reason}") from error


def images_reader(model: Any, layout: Layout, ids: Sequence[int], images: PromptImages) -> ReadActivations:
    """A function that reads the activations of a single request, a prompt with images, in a separate forward pass."""

    def read(where: PositionsByRequest, sites: Sequence[Site], _tokens: int) -> dict[int, dict[Site, Tensor]]:
        activations = read_with_images(model, layout, ids, images, sites)
        return {i: {site: activations[site][list(positions)] for site in sites} for i, positions in where.items()}

    return read


@torch.no_grad()
def read_with_images(
    model: Any, layout: Layout, ids: Sequence[int], images: PromptImages, sites: Sequence[Site]
) -> dict[Site, Tensor]:
    """The activations `[tokens, width]` of a whole prompt with images at each site."""
    row = torch.tensor([list(ids)], device=input_device(model))
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row), **images.inputs, "use_cache": False}
    with (
        recording(layout, sites, lambda x: x[0], to_the_end=True) as activations,
        recording_positions(layout, len(ids)),
    ):
        model(**inputs)
    check_read(sites, activations)
    return dict(activations)


def check_takes_images(model: Any) -> None:
    """Raise `UnsupportedError` for a text-only model."""
    if not compat.takes_images(model):
        raise UnsupportedError(
            f"{type(model).__name__} is a text-only model, and these messages contain images; leave them out, or load"
            " an image-text model"
        )


def load_processor(source: tuple[str, Mapping[str, Any]] | None) -> Any:
    """Load the processor of an image-text model.

    Args:
        source: The Hub id or folder that the model was loaded from, and the options it was loaded with.

    Raises:
        TrimtabError: `source` is `None`, or the processor can't be loaded.
    """
    if source is None:
        raise TrimtabError("images need the model's processor: LM(model, tokenizer, processor=processor)")
    name, options = source
    known = {key: options[key] for key in ("trust_remote_code", "token", "cache_dir", "revision") if key in options}
    try:
        return compat.auto_processor(name, **known)
    except (ImportError, AttributeError) as error:
        raise TrimtabError(
            f"the processor of {name!r} needs a library for images: pip install 'trimtab[vision]'"
            f" ({(str(error).strip().splitlines() or [type(error).__name__])[0][:200]})"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise TrimtabError(f"{name!r} has no processor that can be loaded for images: {reason}") from error


def spans_with_images(
    tokenizer: Any,
    prompt: Sequence[Mapping[str, Any]],
    emphasize: Any,
    ids: Sequence[int],
    *,
    system: str | None,
    template: Template | None,
) -> tuple[Span, ...]:
    """The token positions of phrases in a prompt with images that has these token ids.

    Phrases are found in the text that the chat template renders, where each image is one marker. Apart from the
    images' placeholder tokens, that text has the tokens of the prompt. So a span moves by the tokens that the images
    before it take up.

    Raises:
        TrimtabError: As `find_spans` does.
        UnsupportedError: The rendered text and the token ids can't be aligned.
    """
    short, spans = find_spans_with_images(tokenizer, prompt, emphasize, system=system, template=template)
    first = int(ids[:1] != short[:1] and ids[1:2] == short[:1])  # a first token that the processor adds
    moved = [_moved(short, ids[first:], start, stop) for start, stop in spans]
    return tuple((first + start, first + stop) for start, stop in moved)


def _moved(short: Sequence[int], long: Sequence[int], start: int, stop: int) -> Span:
    """The position of a span of `short` in `long`, which is `short` with tokens inserted in one place before or after.

    Raises:
        UnsupportedError: There are insertions on both sides of the span.
    """
    if list(short[:stop]) == list(long[:stop]):
        return start, stop
    behind = len(long) - len(short)
    if list(short[start:]) == list(long[start + behind :]):
        return start + behind, stop + behind
    raise UnsupportedError(
        "the tokens of a phrase between two images can't be determined; emphasize one before the first image or after"
        " the last"
    )


_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def decodes_from_cache(model: Any, layout: Layout, ids: Sequence[int], images: PromptImages) -> bool:
    """Whether decoding after a prompt with images needs only its KV cache, so that the row can join a batch.

    This is tested once per model, on the first such prompt: a pass over the last token with the cache of the tokens
    before it must give the same logits as a pass over the whole prompt. It fails for models whose blocks cross-attend
    to the image.
    """
    if layout.decoder not in _known:
        _known[layout.decoder] = _try(model, layout, ids, images)
    return _known[layout.decoder]


@torch.no_grad()
def _try(model: Any, layout: Layout, ids: Sequence[int], images: PromptImages) -> bool:
    row = torch.tensor([list(ids)], device=input_device(model))
    mask, last = torch.ones_like(row), len(ids) - 1
    try:
        with reading(layout.decoder):
            whole = compat.whole_cache(model.config)
            with recording_positions(layout, len(ids)):
                expected = last_logits(model, row, mask, None, whole, more=images.inputs)
            if any(_columns(layer) not in (None, len(ids)) for layer in whole.layers):
                return False  # keys of an image in addition to the text's
            cache = compat.whole_cache(model.config)
            with recording_positions(layout, last) as counted:
                last_logits(model, row[:, :last], mask[:, :last], None, cache, more=images.until(last))
            position = torch.full_like(row[:, :1], last + counted.shift)
            logits = last_logits(model, row[:, last:], mask, position, cache)
    except UnsupportedError:
        return False
    limit = TOLERANCES.get(model.dtype, COARSE) * float(expected.norm())
    return bool((logits - expected).norm() <= limit)


def _columns(layer: Any) -> int | None:
    keys = getattr(layer, "keys", None)
    return None if keys is None else int(keys.shape[2])


def check_decodes_from_cache(model: Any, layout: Layout, ids: Sequence[int], images: PromptImages) -> None:
    """Raise `UnsupportedError` if a row with images can't join a batch in continuous batching."""
    if not decodes_from_cache(model, layout, ids, images):
        raise UnsupportedError(
            f"{type(model).__name__} needs a prompt's images at every decode step, not only in prefill, so its rows"
            " can't join continuous batching; lm.generate(…) without rejection, monitors or a clean cache answers"
            " such a prompt"
        )
