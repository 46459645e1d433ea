"""Activations read by an engine's workers: requests of one token, for which they keep the named activations."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.request import Text
from trimtab.engines.vllm.admission import INSTEAD
from trimtab.engines.vllm.frontend import Link
from trimtab.engines.vllm.sampling import sampling_of
from trimtab.engines.vllm.wire import RESOLVED, Part, Reading, Wire
from trimtab.errors import UnsupportedError
from trimtab.steering import Site

AHEAD = 4
"""The engine is given so many times the tokens that are to be read together: it makes batches of its own of them."""


def check_readable(link: Link, sites: Sequence[Site]) -> None:
    """Raises `UnsupportedError` for a site that an engine can't read, and for an engine that can't read."""
    if link.static and not link.capacity.reads:
        raise UnsupportedError(
            "this engine replays captured graphs, which keep no activations to be read (by gates, too); start it with"
            " TRIMTAB_KERNEL=all, with enforce_eager=True, or with compilation_config={'cudagraph_mode': 'NONE'}"
        )
    for site in sites:
        known = site.kind == "residual" or (site.kind in link.inside and site.kind not in link.split)
        if not known or not 0 <= site.layer < link.layers:
            raise UnsupportedError(
                f"the vllm engine reads the residual stream after layers 0 to {link.layers - 1}, not {site}; {INSTEAD},"
                " and so can this one, for heads, neurons, attention and mlp, with TRIMTAB_SITES in its environment and"
                " tensor_parallel_size=1"
            )


def batches(groups: Sequence[Sequence[Text]], tokens: int, ahead: int = AHEAD) -> Iterator[list[int]]:
    """The groups by their numbers, shortest first, in batches of about `ahead` times so many tokens at a time."""
    sizes = [sum(len(text.ids) for text in group) for group in groups]
    chosen: list[int] = []
    for g in sorted(range(len(groups)), key=lambda g: (sizes[g], g)):
        if chosen and sum(sizes[i] for i in chosen) + sizes[g] > ahead * tokens:
            yield chosen
            chosen = []
        chosen.append(g)
    if chosen:
        yield chosen


def params_of(
    texts: Sequence[Text], sites: Sequence[Site], parts: Sequence[Part | None]
) -> tuple[list[str], list[Any]]:
    """The names of the readings, one for each text, and the sampling parameters of the requests that make them."""
    kept = tuple(sorted(set(sites)))
    names, params = [], []
    for text, part in zip(texts, parts, strict=True):
        reading = Reading(uuid.uuid4().hex, kept, tuple(text.positions))
        plain = sampling_of(1, False, None, {})
        plain.skip_reading_prefix_cache = True  # what a block holds isn't computed again
        plain.extra_args = {RESOLVED: Wire(() if part is None else (part,), reading).to_plain()}
        names.append(reading.id)
        params.append(plain)
    return names, params


def taken(workers: Sequence[Sequence[Mapping[Any, Any]]], sites: Sequence[Site]) -> list[Mapping[Site, Tensor]]:
    """For each reading `{site: [positions, width]}` in float32, from what each worker has kept of it."""
    readings: list[Mapping[Site, Tensor]] = []
    for each in zip(*workers, strict=True):
        kept = {name: value for part in each for name, value in part.items()}
        readings.append({site: _tensor(*kept[str(site)]) for site in sites})
    return readings


def _tensor(shape: Sequence[int], data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(*shape)
