"""Prompts with images: rendered by the model's own processor, and read in a pass that is given their pixels.

In a prompt's token ids each image has as many places as it has features, so positions are those of the tokens that the
model computes. Only the pass over the prompt sees pixels; what follows goes on from its cache, at positions that the
model counts as its own pass says: some let an image take up fewer positions than tokens.
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
from trimtab.engines.resolve import Read, Where
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.anatomy import COARSE, OFF
from trimtab.engines.transformers.exclusive import reading
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.passes import last_logits
from trimtab.engines.transformers.read import check_read, recording
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Site
from trimtab.text.chat import Template, checked_messages, has_template, rendering, takes_parts
from trimtab.text.images import BOUNDS, Bounds, with_images
from trimtab.text.spans import Span, found_in_text
from trimtab.text.templates import set_keywords

AXES = 3
"""Of positions with axes of their own for time, height and width, so many; another before them counts tokens."""


def encode_with_images(
    processor: Any,
    tokenizer: Any,
    model: Any,
    prompt: Sequence[Mapping[str, Any]],
    *,
    system: str | None,
    template: Template | None,
    bounds: Bounds = BOUNDS,
) -> tuple[list[int], PromptImages]:
    """The token ids of messages with images, in which each image has its places, and what the model is given of them.

    Raises `TrimtabError` for messages or images that can't be read, and for a processor that refuses them.
    """
    messages = with_images(checked_messages(prompt, system), bounds)
    tokenizer = with_template(tokenizer, processor)
    if takes_parts(tokenizer):
        messages = [_in_parts(message) for message in messages]
    count = sum(
        part["type"] == "image"
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
    )
    keywords = {**set_keywords(tokenizer), **rendering(tokenizer, messages, template)}
    how: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    try:
        encoded = processor.apply_chat_template([dict(message) for message in messages], **how, **keywords)
    except Exception as error:  # templates and processors raise whatever their authors chose
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise TrimtabError(f"the model's processor refuses these messages: {reason}") from error
    ids = encoded["input_ids"]
    if len(ids) != 1 or not bool(torch.as_tensor(encoded["attention_mask"]).all()):
        raise TrimtabError("the model's processor made more than one unpadded row of one prompt")
    return torch.as_tensor(ids)[0].tolist(), PromptImages(_inputs(model, encoded), count)


def with_template(tokenizer: Any, processor: Any) -> Any:
    """The tokenizer, with its processor's chat template where it has none. Raises `TrimtabError` where neither has."""
    if has_template(tokenizer):
        return tokenizer
    if not getattr(processor, "chat_template", None):
        raise TrimtabError("this model's processor has no chat template, so it can't be told where an image stands")
    other = copy.copy(tokenizer)
    other.chat_template = processor.chat_template
    return other


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


def _inputs(model: Any, encoded: Mapping[str, Any]) -> dict[str, Any]:
    """What of a processor's output the model takes, where its inputs go and in its dtype."""
    takes, device = compat.parameters(model), input_device(model)
    inputs: dict[str, Any] = {}
    for name, value in encoded.items():
        if name in ("input_ids", "attention_mask") or value is None:
            continue
        if name not in takes:
            if name.endswith(BY_TOKEN):
                continue
            raise UnsupportedError(
                f"{type(model).__name__} doesn't take {name}, which its processor gives for an image; this processor is"
                " another model's"
            )
        if isinstance(value, Tensor):
            value = value.to(device=device, dtype=model.dtype if value.is_floating_point() else None)
        inputs[name] = value
    if not any("pixel" in name or "image" in name for name in inputs):
        raise TrimtabError("the model's processor made no pixels of these images; its chat template leaves them out")
    return inputs


class Counted:
    """What the decoder was told of its tokens' positions: where the one after them stands, counted from their number.

    `shift` is 0 where the next token's position is the number of tokens before it.
    """

    shift = 0


@contextmanager
def counting(layout: Layout, tokens: int | None) -> Iterator[Counted]:
    """While open, a pass of the whole model over a prompt of so many tokens from its beginning on.

    `None`: several passes, of which nothing is counted. Raises `UnsupportedError` where the decoder computes another
    number of tokens than the prompt has, and `TrimtabError` where the model can't place the images.
    """
    counted, owner = Counted(), get_ident()

    def look(decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        if tokens is None or get_ident() != owner:
            return
        arguments = compat.bound(decoder, args, kwargs)
        entering = arguments.get("inputs_embeds") if arguments.get("input_ids") is None else arguments["input_ids"]
        if isinstance(entering, Tensor) and entering.shape[1] != tokens:
            raise UnsupportedError(
                f"{type(decoder).__name__} computes {entering.shape[1]} tokens of a prompt that has {tokens}: it puts"
                " images in beside the text; which token is at which position can't be told"
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
    except Exception as error:  # a model that can't place features raises whatever its authors chose
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise TrimtabError(f"the model can't read this prompt's images: {reason}") from error


def images_reader(model: Any, layout: Layout, ids: Sequence[int], images: PromptImages) -> Read:
    """Reads one prompt with images, the only request there is, by a pass of its own."""

    def read(where: Where, sites: Sequence[Site], _tokens: int) -> dict[int, dict[Site, Tensor]]:
        activations = read_with_images(model, layout, ids, images, sites)
        return {i: {site: activations[site][list(positions)] for site in sites} for i, positions in where.items()}

    return read


@torch.no_grad()
def read_with_images(
    model: Any, layout: Layout, ids: Sequence[int], images: PromptImages, sites: Sequence[Site]
) -> dict[Site, Tensor]:
    """The activations `[tokens, width]` of a whole prompt with images, at each site."""
    row = torch.tensor([list(ids)], device=input_device(model))
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row), **images.inputs, "use_cache": False}
    with recording(layout, sites, lambda x: x[0], to_the_end=True) as activations, counting(layout, len(ids)):
        model(**inputs)
    check_read(sites, activations)
    return dict(activations)


def check_takes_images(model: Any) -> None:
    """Raises `UnsupportedError` for a model of text alone."""
    if not compat.takes_images(model):
        raise UnsupportedError(
            f"{type(model).__name__} is a model of text alone, and these messages have images; leave them out, or load"
            " an image-text model"
        )


def load_processor(source: tuple[str, Mapping[str, Any]] | None) -> Any:
    """The processor of an image-text model, from where the model was loaded: a Hub id or folder, and the options.

    Raises `TrimtabError` where it can't be had.
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


def spans_beside_images(
    tokenizer: Any,
    prompt: Sequence[Mapping[str, Any]],
    emphasize: Any,
    ids: Sequence[int],
    *,
    system: str | None,
    template: Template | None,
) -> tuple[Span, ...]:
    """The token positions of phrases in a prompt with images, whose token ids these are.

    A phrase is found in the text that the chat template writes, in which an image has one mark. The tokens of that
    text are the prompt's but for the images' places; so a span is moved by what the images before it take up.

    Raises `TrimtabError` as `find_spans` does, `UnsupportedError` where the one can't be laid beside the other.
    """
    short, spans = found_in_text(tokenizer, prompt, emphasize, system=system, template=template)
    first = int(ids[:1] != short[:1] and ids[1:2] == short[:1])  # a token that the processor begins with
    moved = [_moved(short, ids[first:], start, stop) for start, stop in spans]
    return tuple((first + start, first + stop) for start, stop in moved)


def _moved(short: Sequence[int], long: Sequence[int], start: int, stop: int) -> Span:
    """Where a stretch of a text stands in the same text with some tokens put in between; from either end, one place."""
    if list(short[:stop]) == list(long[:stop]):
        return start, stop
    behind = len(long) - len(short)
    if list(short[start:]) == list(long[start + behind :]):
        return start + behind, stop + behind
    raise UnsupportedError(
        "this phrase stands between two images, where its tokens can't be told; emphasize one before the first image or"
        " after the last"
    )


_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def goes_on(model: Any, layout: Layout, ids: Sequence[int], images: PromptImages) -> bool:
    """Whether what follows such a prompt needs its cache alone, so that its row can join others.

    It is tried once a model, on a prompt that it is asked about: the last token read over the cache of those before
    gives what a pass over all of them does. Not so where blocks attend to an image beside the text.
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
            with counting(layout, len(ids)):
                expected = last_logits(model, row, mask, None, whole, more=images.inputs)
            if any(_columns(layer) not in (None, len(ids)) for layer in whole.layers):
                return False  # keys of an image, beside the text's
            cache = compat.whole_cache(model.config)
            with counting(layout, last) as counted:
                last_logits(model, row[:, :last], mask[:, :last], None, cache, more=images.until(last))
            position = torch.full_like(row[:, :1], last + counted.shift)
            logits = last_logits(model, row[:, last:], mask, position, cache)
    except UnsupportedError:
        return False
    limit = OFF.get(model.dtype, COARSE) * float(expected.norm())
    return bool((logits - expected).norm() <= limit)


def _columns(layer: Any) -> int | None:
    keys = getattr(layer, "keys", None)
    return None if keys is None else int(keys.shape[2])


def check_goes_on(model: Any, layout: Layout, ids: Sequence[int], images: PromptImages) -> None:
    """Raises `UnsupportedError` where a row with images can't join a batch of steps."""
    if not goes_on(model, layout, ids, images):
        raise UnsupportedError(
            f"{type(model).__name__} needs a prompt's images at every token, not in the pass over the prompt alone, so"
            " that its rows can't join a batch of steps; lm.generate(…) without rejection, monitors or a clean cache"
            " answers such a prompt by itself"
        )
