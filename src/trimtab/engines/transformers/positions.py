"""The text positions of the tokens that a forward pass computes, derived from the decoder's inputs.

A pass computes `length` columns of every row, after the `past` columns in the cache. A token's position in its row's
text is its column minus the number of padding columns before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.engines.transformers import compat
from trimtab.errors import TrimtabError, UnsupportedError

Segments = tuple[tuple[int, int | None, int], ...]
"""A request's `(start, stop, state)` spans in order of position; positions outside of them are in state 0."""


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass of the decoder: `rows` by `length` tokens after `past` columns.

    `mask` is the padding mask `[rows, past + length]`, 1 at text; `None` without a mask of that shape.
    """

    rows: int
    length: int
    past: int
    mask: Tensor | None
    device: torch.device
    ids: Tensor | None

    @property
    def stop(self) -> int:
        """The number of columns after the pass, including padding."""
        return self.past + self.length


def read_pass(decoder: nn.Module, arguments: dict[str, Any], outer_mask: Any, reached: int | None) -> ForwardPass:
    """Derive the `ForwardPass` from the decoder's arguments.

    Args:
        decoder: The module that is called.
        arguments: Its arguments by name.
        outer_mask: The attention mask that the whole model got; the decoder may get it in another shape.
        reached: The number of columns of this text that have been computed so far; `None` for a new text.

    Raises:
        TrimtabError: The positions of its tokens can't be determined.
    """
    name = type(decoder).__name__
    ids = arguments.get("input_ids")
    tokens = ids if ids is not None else arguments.get("inputs_embeds")
    if tokens is None:
        raise UnsupportedError(f"{name} was called with neither input_ids nor inputs_embeds")
    rows, length = tokens.shape[:2]
    mask = as_padding_mask(arguments.get("attention_mask"))
    mask = as_padding_mask(outer_mask) if mask is None else mask
    cache = compat.cache_of(arguments, name)
    past = 0 if cache is None else compat.past_length(cache)
    if past is None:  # a recurrent state doesn't know its length, but all passes since the start of the text were seen
        past = reached
    if mask is not None:
        by_mask = mask.shape[1] - length
        if by_mask < 0:
            raise TrimtabError(f"the attention mask has {mask.shape[1]} columns for {length} tokens")
        if cache is not None and past is not None and past != by_mask:
            raise TrimtabError(
                f"{name} was given a cache of {past} tokens and {length} new ones under a mask of {mask.shape[1]}"
                " columns; which token is at which position can't be determined"
            )
        past = by_mask
    if past is None:
        raise TrimtabError(
            f"steering began in the middle of a text: {type(cache).__name__} holds a state of tokens that weren't"
            " steered; start again"
        )
    if cache is None and mask is None:
        _check_first(name, arguments, length, reached)
    return ForwardPass(rows, length, past, mask, tokens.device, ids if ids is not None and ids.dim() == 2 else None)


def _check_first(name: str, arguments: dict[str, Any], length: int, reached: int | None) -> None:
    """Check that a pass without a cache and a mask starts at the beginning of a text, by its position ids if any."""
    positions = arguments.get("position_ids")
    if isinstance(positions, Tensor):
        first = int(positions[..., 0].min())
        if first == 0:
            return
        raise TrimtabError(
            f"{name} was given a token at position {first}, but no cache of the tokens before it that trimtab can"
            f" find; its arguments were {', '.join(sorted(k for k, v in arguments.items() if v is not None))}"
        )
    if length == 1 and reached:
        raise TrimtabError(
            f"{name} was given one token after {reached} others, without a cache, a mask or position ids: its position"
            " can't be determined"
        )


def check_not_packed(forward_pass: ForwardPass, position_ids: Any) -> None:
    """Raise `UnsupportedError` if position ids restart inside a row: several texts are packed into it."""
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or forward_pass.length < 2:
        return
    falls = position_ids[:, 1:] < position_ids[:, :-1]
    if forward_pass.mask is not None:  # padding may have any position ids
        text = forward_pass.mask[:, -forward_pass.length :].bool()
        falls = falls & text[:, 1:] & text[:, :-1]
    if bool(falls.any()):
        raise UnsupportedError(
            "the position ids restart inside a row: several texts are packed into it, and the ends of their prompts"
            " can't be determined; give each text its own row"
        )


def as_padding_mask(mask: Any) -> Tensor | None:
    """The mask, if it is a padding mask `[rows, columns so far]`, else `None`."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask != 0 if mask.is_floating_point() else mask


def left_padded(mask: Tensor) -> bool:
    """Whether all padding is on the left."""
    return bool((mask[:, 1:] >= mask[:, :-1]).all())


def count_pads(forward_pass: ForwardPass, unseen: Any, lengths: Sequence[int] | None, columns: int | None) -> list[int]:
    """The number of padding columns in each row so far.

    Args:
        forward_pass: The pass.
        unseen: The mask that the model got, if the pass has no two-dimensional one.
        lengths: The requests' prompt lengths, if known.
        columns: The width to which the prompts are left-padded, if known.

    Raises:
        UnsupportedError: The padding can't be determined from the mask.
    """
    if forward_pass.mask is not None:
        return (forward_pass.mask.shape[1] - forward_pass.mask.sum(-1)).tolist()
    if columns is not None and lengths is not None:
        repeat = forward_pass.rows // len(lengths)
        return [columns - n for n in lengths for _ in range(repeat)]
    if unseen is not None:
        raise UnsupportedError("can't tell padding from text in this attention mask; pass a two-dimensional one")
    return [0] * forward_pass.rows


def last_column(row: list[int]) -> int:
    """The last text column in a row of a mask; -1 if there is none."""
    return next((i for i in reversed(range(len(row))) if row[i]), -1)


def states_from(segments: Segments, first: int, length: int) -> tuple[int, ...]:
    """The states of `length` positions from `first` on; negative positions are padding."""
    states = [0] * length
    for start, stop, state in segments:
        low = max(0, start - first)
        high = length if stop is None else min(length, stop - first)
        if low < high:
            states[low:high] = [state] * (high - low)
    return tuple(states)


def state_at(segments: Segments, position: int) -> int:
    """The state of one position."""
    return states_from(segments, position, 1)[0] if position >= 0 else 0


def states_of(
    segments: Sequence[Segments], forward_pass: ForwardPass, pads: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Each row's states in a pass, one per column. Several adjacent rows may belong to one request (beams, samples)."""
    repeat = forward_pass.rows // len(segments)
    if in_order(forward_pass):
        return tuple(
            states_from(segments[r // repeat], forward_pass.past - pads[r], forward_pass.length)
            for r in range(forward_pass.rows)
        )
    return tuple(
        tuple(state_at(segments[r // repeat], p) for p in row)
        for r, row in enumerate(token_positions(forward_pass, pads))
    )


def in_order(forward_pass: ForwardPass) -> bool:
    """Whether the positions of a pass increase by one from column to column."""
    return forward_pass.length == 1 or forward_pass.mask is None or left_padded(forward_pass.mask)


def token_positions(forward_pass: ForwardPass, pads: Sequence[int]) -> list[list[int]]:
    """Each row's positions in a pass, one per column; negative ones are padding."""
    if forward_pass.mask is None or in_order(forward_pass):
        return [
            [forward_pass.past - pads[r] + column for column in range(forward_pass.length)]
            for r in range(forward_pass.rows)
        ]
    positions: list[list[int]] = torch.where(forward_pass.mask.bool(), forward_pass.mask.long().cumsum(-1) - 1, -1)[
        :, forward_pass.past :
    ].tolist()
    return positions


def count_steered(segments: Segments, touched: frozenset[int], start: int, stop: int) -> int:
    """The number of positions from `start` to `stop` that are in one of these states."""
    count = 0
    for first, after, state in segments:
        if state in touched:
            count += max(0, min(stop, stop if after is None else after) - max(start, first))
    return count
