"""What blocks put out, found by running them: one stream, several, or a block that runs twice."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from torch import Tensor

from trimtab import LM, Site, TrimtabError
from trimtab.doctor.tiny import tiny_lm
from trimtab.engines.arguments import split_by_length
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.anatomy import PositionHandling, Streams, block_of, position_handling
from trimtab.engines.transformers.places import place

ROWS, TOKENS, WIDTH, COUNT = 2, 3, 5, 4


def known(kind: str) -> LM:
    """A tiny model of the type; the test is skipped where this transformers doesn't have it yet."""
    if kind.split("@")[0] not in compat.CONFIGURATIONS:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    return tiny_lm(kind)


WAYS = {
    "side": (ROWS, TOKENS, COUNT, WIDTH),
    "front": (COUNT, ROWS, TOKENS, WIDTH),
    "folded": (ROWS, TOKENS, COUNT * WIDTH),
}


def stream(x: Tensor, way: str, number: int) -> Tensor:
    """One of the streams, `[rows, tokens, width]`."""
    if way == "side":
        return x[:, :, number]
    return x[number] if way == "front" else x[:, :, number * WIDTH : (number + 1) * WIDTH]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("active", [None, 2])
def test_reading_and_moving_streams(way: str, active: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(WAYS[way], generator=generator, dtype=torch.float64)
    change = torch.randn(ROWS, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    streams = Streams(COUNT, 0 if way == "front" else 2, way == "folded", active)
    each = [stream(x, way, number) for number in range(COUNT)]
    expected = sum(each) / COUNT if active is None else each[active]
    assert torch.allclose(streams.read(x), expected, atol=1e-12)
    moved = streams.with_change(x, change)
    for number in range(COUNT):
        step = change if active in (None, number) else 0
        assert torch.equal(stream(moved, way, number), each[number] + step)
    assert torch.equal(streams.with_change(x, torch.zeros_like(change)), x)


@pytest.mark.parametrize(
    ("kind", "streams"),
    [
        ("llama", None),
        ("gemma3n_text", Streams(4, 0, False, 0)),
        ("hy_v4", Streams(4, 2, False, None)),
        ("qwen4_exp_text", Streams(4, 2, True, None)),
    ],
)
def test_streams_are_found(kind: str, streams: Streams | None) -> None:
    lm = known(kind)
    assert [block_of(lm.layout, layer).streams for layer in range(4)] == [streams] * 4


def test_a_block_that_runs_twice_is_refused() -> None:
    lm = known("dory")
    assert [block_of(lm.layout, layer).runs for layer in range(4)] == [1, 2, 2, 1]
    for kind in ("residual", "heads", "mlp"):
        with pytest.raises(TrimtabError, match="runs 2 times"):
            place(lm.layout, Site(1, kind))
    assert place(lm.layout, Site(0)).streams is None


def test_a_part_of_several_blocks_is_refused() -> None:
    lm = known("llama")
    lm.layout.blocks[1].self_attn = lm.layout.blocks[2].self_attn
    with pytest.raises(TrimtabError, match="between several blocks"):
        place(lm.layout, Site(1, "heads"))


@pytest.mark.parametrize(
    ("kind", "takes_positions", "ignored"),
    [
        ("llama", True, True),
        ("bloom", False, True),
        ("jamba", True, True),
        ("bart", False, False),
        ("roberta", False, True),
    ],
)
def test_how_positions_are_counted(kind: str, takes_positions: bool, ignored: bool) -> None:
    assert position_handling(tiny_lm(kind).layout) == PositionHandling(takes_positions, ignored)


def test_prompts_of_equal_length_stay_together() -> None:
    assert split_by_length([3, 0, 2, 1], [5, 4, 4, 5]) == [[3, 0], [2, 1]]


def test_where_pads_are_counted_rows_are_what_they_are_alone() -> None:
    lm = known("bart")
    prompts = [tiny.prompt(seed, length) for seed, length in enumerate((8, 5, 8, 3))]
    together = lm.generate(prompts, max_new_tokens=4, logprobs=True)
    for text, answer in zip(prompts, together, strict=True):
        (alone,) = lm.generate(text, max_new_tokens=4, logprobs=True)
        assert alone.token_ids == answer.token_ids
        assert alone.logprobs == pytest.approx(answer.logprobs, abs=1e-8)
