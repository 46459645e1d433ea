"""Read activations through an engine's workers, with requests for one token that make the workers keep activations."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.request import Text
from trimtab.engines.vllm.admission import USE_TRANSFORMERS
from trimtab.engines.vllm.frontend import Link
from trimtab.engines.vllm.sampling import sampling_of
from trimtab.engines.vllm.wire import RESOLVED_KEY, Part, Reading, Wire
from trimtab.errors import UnsupportedError
from trimtab.steering import Site

AHEAD = 4
"""The engine is given this many times the tokens that should be read together, since it makes its own batches."""


def check_readable(link: Link, sites: Sequence[Site]) -> None:
    """Raises `UnsupportedError` for a site that the engine can't read, and for an engine that can't read at all."""
    if link.static and not link.capacity.reads:
        raise UnsupportedError(
            "this engine replays captured graphs, which keep no activations for reading or for gates; start it with"
            " TRIMTAB_KERNEL=all, with enforce_eager=True, or with compilation_config={'cudagraph_mode': 'NONE'}"
        )
    for site in sites:
        known = site.kind == "residual" or (site.kind in link.inside and site.kind not in link.split)
        if not known or not 0 <= site.layer < link.layers:
            raise UnsupportedError(
                f"the vllm engine reads the residual stream after layers 0 to {link.layers - 1}, not {site};"
                f" {USE_TRANSFORMERS}, and so can this one, for heads, neurons, attention and mlp, with TRIMTAB_SITES"
                " in its environment and tensor_parallel_size=1"
            )


def batches(groups: Sequence[Sequence[Text]], tokens: int, ahead: int = AHEAD) -> Iterator[list[int]]:
    """The indices of the groups, shortest first, in batches of about `ahead * tokens` tokens."""
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
    """The ids of the readings, one per text, and the sampling parameters of the requests that perform them."""
    kept = tuple(sorted(set(sites)))
    names, params = [], []
    for text, part in zip(texts, parts, strict=True):
        reading = Reading(uuid.uuid4().hex, kept, tuple(text.positions))
        plain = sampling_of(1, False, None, {})
        plain.skip_reading_prefix_cache = True  # tokens in cached blocks wouldn't be computed
        plain.extra_args = {RESOLVED_KEY: Wire(() if part is None else (part,), reading).to_plain()}
        names.append(reading.id)
        params.append(plain)
    return names, params


def collect_readings(
    workers: Sequence[Sequence[Mapping[Any, Any]]], sites: Sequence[Site]
) -> list[Mapping[Site, Tensor]]:
    """For each reading `{site: [positions, width]}` in float32, from the parts that each worker has kept."""
    readings: list[Mapping[Site, Tensor]] = []
    for each in zip(*workers, strict=True):
        kept = {name: value for part in each for name, value in part.items()}
        readings.append({site: _tensor(*kept[str(site)]) for site in sites})
    return readings


def _tensor(shape: Sequence[int], data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(*shape)
