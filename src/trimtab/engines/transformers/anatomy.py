"""The shape of a model's block outputs, one residual stream or several, determined once by a short forward pass.

Most blocks output `[rows, tokens, width]`. Some models carry several streams through their blocks (hyper-connections:
DeepSeek V4; AltUp: Gemma 3n), and some run a block several times per pass (looped models). The configuration doesn't
say so, so a few arbitrary tokens are run through the model and the shapes of the outputs are recorded.

With several streams, *the* residual stream is the one that the configuration declares active, which is the one that the
block's attention and MLP read (AltUp). If none is declared, it is the mean of the streams, and an edit is added to all
of them. Hyper-connections mix streams with weights that sum to one, so an offset common to all streams passes through
as it does in a single stream.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.exclusive import is_steered, reading
from trimtab.engines.transformers.layout import Layout, stream_dtype
from trimtab.engines.transformers.weights import input_device, quantization
from trimtab.errors import UnsupportedError

ROWS, TOKENS = 3, 5
"""The shape of the probe batch, chosen because no model has that many streams."""

_known: WeakKeyDictionary[nn.Module, tuple[Block, ...]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Streams:
    """Several residual streams in one tensor.

    `axis` is the additional axis for the streams, in a tensor that is otherwise `[rows, tokens, width]`. With `folded`,
    the streams are concatenated along the last axis instead. `active` is the index of the stream that is read and
    edited; with `None`, it is the mean.
    """

    count: int
    axis: int
    folded: bool
    active: int | None

    def read(self, x: Tensor) -> Tensor:
        """The residual stream `[rows, tokens, width]`: a view of the active one, or the mean, which is a copy."""
        streams = x.unflatten(-1, (self.count, -1)) if self.folded else x
        return streams.mean(self.axis) if self.active is None else streams.select(self.axis, self.active)

    def with_change(self, x: Tensor, change: Tensor) -> Tensor:
        """A new tensor of the streams after adding `change` `[rows, tokens, width]` to the residual stream."""
        streams = x.unflatten(-1, (self.count, -1)) if self.folded else x
        if self.active is None:
            streams = streams + change.unsqueeze(self.axis)
        else:
            streams = streams.clone()
            streams.select(self.axis, self.active).add_(change)
        return streams.flatten(-2) if self.folded else streams


@dataclass(frozen=True)
class Block:
    """How often a block runs per pass, and its output streams (`None`: one); `shape` if its output isn't understood."""

    runs: int
    streams: Streams | None
    shape: tuple[int, ...] | None = None


PLAIN = Block(1, None)

_positions: WeakKeyDictionary[nn.Module, PositionHandling] = WeakKeyDictionary()
PADS = 3
"""The number of pads in the test for left padding."""
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3}
COARSE = 0.1
"""Relative tolerance, by dtype, within which two last hidden states count as equal; `COARSE` for any other dtype."""


@dataclass(frozen=True)
class PositionHandling:
    """How a model handles position ids and left padding.

    `takes_positions`: it takes `position_ids` that start at 0, also with a cache. `False` for models that take them but
    start elsewhere (RoBERTa). `ignores_pads`: a text with left padding and an attention mask gives the same result as
    without padding.
    """

    takes_positions: bool
    ignores_pads: bool


def position_handling(layout: Layout) -> PositionHandling:
    """How the model handles position ids and left padding, tested once, on five tokens."""
    if layout.decoder not in _positions:
        if is_steered(layout.decoder):  # the hooks of the current run would act on these passes
            return PositionHandling("position_ids" in compat.parameters(layout.decoder), True)
        _positions[layout.decoder] = _count(layout)
    return _positions[layout.decoder]


@torch.no_grad()
def _count(layout: Layout) -> PositionHandling:
    takes = "position_ids" in compat.parameters(layout.decoder)
    try:
        with reading(layout.decoder):
            alone = _last(layout, 0, with_positions=False)
            takes_positions = takes and _near(layout, alone, _last(layout, 0, with_positions=True))
            takes_positions = takes_positions and (not _plain(layout) or _near(layout, alone, _continued(layout)))
            return PositionHandling(
                takes_positions, _near(layout, alone, _last(layout, PADS, with_positions=takes_positions))
            )
    except Exception:  # a model that can't run raises its own error when it is used
        return PositionHandling(takes, True)


def _last(layout: Layout, pads: int, *, with_positions: bool) -> Tensor:
    """The last hidden state `[width]` of five tokens after `pads` pads."""
    device = input_device(layout.decoder)
    ids = torch.arange(1, 1 + TOKENS, device=device)[None]
    mask = torch.cat([ids.new_zeros(1, pads), torch.ones_like(ids)], 1)
    inputs = {"input_ids": torch.cat([ids.new_zeros(1, pads), ids], 1), "attention_mask": mask}
    if with_positions:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    output = layout.decoder(**inputs, use_cache=False)
    state: Tensor = (output if isinstance(output, Tensor) else output[0])[0, -1]
    return state.double()


def _plain(layout: Layout) -> bool:
    try:
        return compat.keeps_plain_cache(layout.decoder)
    except UnsupportedError:  # it takes no known cache
        return False


def _continued(layout: Layout) -> Tensor:
    """The last hidden state `[width]` of five tokens after pads, with the last two run over a cache of the others."""
    decoder = layout.decoder
    ids = torch.arange(1, 1 + TOKENS, device=input_device(decoder))[None]
    ids = torch.cat([ids.new_zeros(1, PADS), ids], 1)
    mask = (ids > 0).long()
    positions, stop = (mask.cumsum(-1) - 1).clamp(min=0), ids.shape[1] - 2
    cache = compat.new_cache(decoder.config)
    for here in (slice(0, stop), slice(stop, None)):
        inputs = {"input_ids": ids[:, here], "attention_mask": mask[:, : here.stop], "position_ids": positions[:, here]}
        output = decoder(**compat.with_cache(decoder, inputs, cache), use_cache=True)
    state: Tensor = (output if isinstance(output, Tensor) else output[0])[0, -1]
    return state.double()


def _near(layout: Layout, state: Tensor, other: Tensor) -> bool:
    exact = quantization(layout.decoder) is None  # quantized, passes of different shapes may round differently
    return bool(
        (state - other).norm() <= (TOLERANCES.get(stream_dtype(layout), COARSE) if exact else COARSE) * state.norm()
    )


def block_of(layout: Layout, layer: int) -> Block:
    """The output of a block."""
    if layout.decoder not in _known:
        if is_steered(layout.decoder):  # the hooks of the current run would act on this pass
            return PLAIN
        _known[layout.decoder] = _examine(layout)
    return _known[layout.decoder][layer]


@torch.no_grad()
def _examine(layout: Layout) -> tuple[Block, ...]:
    outputs: list[list[tuple[int, ...]]] = [[] for _ in layout.blocks]

    def leave(number: int) -> Any:
        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            parts = [output] if isinstance(output, Tensor) else list(output)
            several = hasattr(output, "_fields")  # a named tuple of streams with different meanings (Reformer)
            outputs[number].append((len(parts),) if several else tuple(parts[0].shape))

        return look

    device = input_device(layout.decoder)
    ids = torch.arange(1, 1 + ROWS * TOKENS, device=device).view(ROWS, TOKENS)
    weight = getattr(layout.decoder.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    ids = ids if weight is None else ids % weight.shape[0]
    # a model that can't run raises its own error when it is used
    with reading(layout.decoder), ExitStack() as hooks, suppress(Exception):
        for i, block in enumerate(layout.blocks):
            hooks.enter_context(block.register_forward_hook(leave(i)))
        layout.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return tuple(_block(layout, shapes) for shapes in outputs)


def _block(layout: Layout, shapes: list[tuple[int, ...]]) -> Block:
    if not shapes:  # the block didn't run, such as cross-attention to images in a text without any
        return PLAIN
    shape, width = shapes[0], layout.width
    plain = (ROWS, TOKENS, width)
    active = compat.active_stream(layout.decoder.config)
    if shape == plain:
        return Block(len(shapes), None)
    if len(shape) == 4 and shape[:2] == plain[:2] and shape[3] == width:
        return Block(len(shapes), Streams(shape[2], 2, False, active))
    if len(shape) == 4 and shape[1:] == plain:
        return Block(len(shapes), Streams(shape[0], 0, False, active))
    if len(shape) == 3 and shape[:2] == plain[:2] and shape[2] % width == 0:
        return Block(len(shapes), Streams(shape[2] // width, 2, True, active))
    return Block(len(shapes), None, shape)
