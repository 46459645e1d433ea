"""The checks of how a model is loaded: quantized weights, several devices, offloaded weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.doctor import naive
from trimtab.doctor.report import Remark
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.weights import device_of, input_device, is_offloaded, quantization
from trimtab.lm import LM
from trimtab.steering import Add, Edit, Positions, Site, Steering

if TYPE_CHECKING:
    from trimtab.doctor.checks import Checks


TOLERANCE = 1e-3
"""How much log-probabilities may differ between passes of different shapes from float32 rounding alone."""


@dataclass(frozen=True)
class Rounding:
    """How far passes of different shapes differ in a model, unsteered: in log-probabilities, and in activations
    (relative to the largest element).
    """

    logprobs: float = 0.0
    activations: float = 0.0


@torch.no_grad()
def rounding_of(lm: LM, texts: Sequence[Sequence[int]]) -> Rounding:
    """How a quantized model rounds: each prefix of a text is run alone, within the whole text, and from a cache."""
    if quantization(lm.model) is None:
        return Rounding()
    site = Site(lm.layout.layers - 1)
    logprobs, activations = 0.0, 0.0
    for text in texts:
        ids = torch.tensor([list(text)], device=input_device(lm.model))
        logits = lm.model(input_ids=ids, use_cache=False).logits[0]
        whole = naive.activations(lm, text, [site])[site]
        largest = max(1.0, float(whole.abs().max()))
        for stop in range(1, len(text)):
            alone = naive.logits(lm, text[:stop])
            off = alone.log_softmax(-1) - logits[stop - 1].to(alone).log_softmax(-1)
            logprobs = max(logprobs, float(off.abs().max()))
            part = naive.activations(lm, text[:stop], [site])[site]
            activations = max(activations, float((part - whole[:stop]).abs().max()) / largest)
        stepped, there = _stepped(lm, ids, site)
        off = (stepped.log_softmax(-1) - logits.to(stepped).log_softmax(-1)).abs().max()
        logprobs = max(logprobs, float(off))
        activations = max(activations, float((there - whole).abs().max()) / largest)
    return Rounding(logprobs, activations)


def _stepped(lm: LM, ids: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """The logits and activations at each token of a text whose second half is run token by token, from a cache."""
    cache, half, logits = compat.new_cache(lm.layout.decoder.config), ids.shape[1] // 2, []
    here: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        here.append(x.clone())
        return x

    handle = naive.hook(lm, site, keep)
    try:
        for start, stop in [(0, half), *((i, i + 1) for i in range(half, ids.shape[1]))]:
            inputs = compat.with_cache(lm.model, {"input_ids": ids[:, start:stop]}, cache)
            logits.append(lm.model(**inputs, use_cache=True).logits[0].float())
    finally:
        handle.remove()
    return torch.cat(logits), torch.cat(here)


def quantized(checks: Checks) -> str | None:
    """Check whether weights are quantized, and whether that makes answers depend on the rest of the batch."""
    method = quantization(checks.lm.model)
    if method is None:
        return None
    rounding = rounding_of(checks.lm, checks.ids)
    if rounding.logprobs <= TOLERANCE:
        return Remark(f"by {method}")
    return (
        f"by {method}, which rounds differently in forward passes of different shapes: unsteered log-probabilities"
        f" differ by up to {rounding.logprobs:.2g} between them, so an answer may depend on its batch"
    )


def devices(checks: Checks) -> str | None:
    """Find the devices of a model's blocks, and check steering and reading at one block on each device."""
    lm = checks.lm
    spans = list(_spans(lm))
    offloaded = is_offloaded(lm.model)
    if len(spans) == 1 and not offloaded:
        return Remark(f"on {spans[0][1]}")
    ids = checks.ids[0]
    last = Site(checks.last)
    for layers, device in spans:
        site = Site(next((layer for layer in layers if layer in checks.running_layers), checks.last))
        v = checks.direction(site, 7)
        steering = Steering((Edit(site, Add(v), Positions.all()),))
        sites = [site, last]
        (captured,) = lm.capture(
            checks.prompts[0], sites, Positions.all(), chat=False, steering=steering, transfer=True
        )

        def moved(x: Tensor, v: Tensor = v) -> Tensor:
            return x + v.to(x)

        with naive.changed(lm, {site: moved}):
            expected = naive.activations(lm, ids, [last])[last]
        checks.check_close(captured[last].cpu(), expected.cpu(), f"an addition at {site}, on {device}")
    where = "; ".join(f"blocks {layers[0]} to {layers[-1]} on {device}" for layers, device in spans)
    return Remark(where + (", some of them fetched while they run" if offloaded else ""))


def _spans(lm: LM) -> Iterator[tuple[list[int], torch.device]]:
    """Runs of consecutive blocks on one device."""
    places = [(layer, device_of(block)) for layer, block in enumerate(lm.layout.blocks)]
    for device, group in groupby(places, key=lambda place: str(place[1])):
        yield [layer for layer, _ in group], torch.device(device)
