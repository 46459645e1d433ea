"""Trainable parameters: at each site a vector, optionally with a low-rank map."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from trimtab.engines.transformers.forced import Change, PromptAnswer, TeacherForcing, group_by_pass
from trimtab.engines.transformers.places import place
from trimtab.errors import TrimtabError
from trimtab.steering import Add, Edit, Positions, ReadWrite, Site

if TYPE_CHECKING:
    from typing_extensions import Self

    from trimtab.engines.transformers.layout import Layout

P = TypeVar("P")
Q = TypeVar("Q", bound=Any)
Initializer = Callable[[Mapping[Site, float], Mapping[Site, int], torch.device], P]
"""Creates initial parameters from the root mean square of the activations and their width, by site, and the device."""

FROM_LAST_PROMPT_TOKEN = Positions.from_last_prompt_token()
SCALE_TEXTS = 16
"""The number of answers from which the typical activation is estimated."""
INITIAL_READ_NORM = 0.1
"""The initial norm of a row of `read`: it reads about a tenth of an activation's root mean square. `write` starts at 0.
"""


@dataclass(frozen=True)
class SiteParameters:
    """The parameters at one site: `x + x readᵀ write + vector`, in units of the activations there.

    `scale` is the root mean square of an activation's elements at the site. `vector` `[width]` and `write`
    `[rank, width]` are multiples of it, and `read` `[rank, width]` is a multiple of its inverse, so that one learning
    rate suits every site of every model.
    """

    scale: float
    vector: Tensor
    read: Tensor
    write: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.vector, self.read, self.write) if len(self.read) else (self.vector,)

    def change(self, factor: float, x: Tensor) -> Tensor:
        """The change of activations `[tokens, width]`, times `factor`."""
        vector, read, write = (tensor.to(x.device) for tensor in (self.vector, self.read, self.write))
        added = vector.expand_as(x)
        if len(read):
            added = added + (x.float() @ read.T / self.scale) @ write
        return factor * self.scale * added

    def operation(self) -> Add | ReadWrite:
        """The equivalent operation. With a map, the vector becomes a row with a zero `read` and a bias of 1."""
        vector = (self.scale * self.vector.detach()).cpu()
        if not len(self.read):
            return Add(vector)
        read, write = (self.read.detach() / self.scale).cpu(), (self.scale * self.write.detach()).cpu()
        bias = torch.zeros(len(read) + 1)
        bias[-1] = 1.0
        return ReadWrite(torch.cat([read, torch.zeros(1, read.shape[1])]), torch.cat([write, vector[None]]), bias)


@dataclass(frozen=True)
class ParameterSet(Generic[Q]):
    """All parameters by site: `SiteParameters`s, or other objects with `tensors`, `change` and `operation`."""

    by_site: Mapping[Site, Q]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that the optimizer updates."""
        return [tensor for site in sorted(self.by_site) for tensor in self.by_site[site].tensors]

    def changes(self, factor: float = 1.0) -> dict[Site, Change]:
        """The change at each site, times `factor`."""
        return {site: partial(part.change, factor) for site, part in self.by_site.items()}

    def frozen(self) -> Self:
        """A copy that the optimizer doesn't update."""
        copies = {}
        for site, part in self.by_site.items():
            held = {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}
            copies[site] = replace(part, **{name: tensor.detach().clone() for name, tensor in held.items()})
        return type(self)(copies)

    def edits(self, positions: Positions = FROM_LAST_PROMPT_TOKEN) -> tuple[Edit, ...]:
        """The equivalent edits of strength 1, in the order of their sites."""
        return tuple(Edit(site, self.by_site[site].operation(), positions) for site in sorted(self.by_site))


class LowRankParameters(ParameterSet[SiteParameters]):
    """A vector at each site, optionally with a low-rank map."""

    @classmethod
    def initial(
        cls, scales: Mapping[Site, float], widths: Mapping[Site, int], rank: int, seed: int, device: torch.device
    ) -> LowRankParameters:
        """The initial parameters, which change nothing.

        Args:
            scales: The root mean square of an activation's elements, by site.
            widths: The width of activations, by site.
            rank: The rank of the map at each site; 0 for only a vector.
            seed: The seed of the initial `read`.
            device: The device of the tensors.

        Raises:
            TrimtabError: Activations are zero or not finite.
        """
        generator = torch.Generator().manual_seed(seed)
        parts = {}
        for site in nonzero_sites(scales):
            width = widths[site]
            read = torch.randn(rank, width, generator=generator) * (INITIAL_READ_NORM / width**0.5)
            tensors = (torch.zeros(width), read, torch.zeros(rank, width))
            parts[site] = SiteParameters(scales[site], *(tensor.to(device).requires_grad_() for tensor in tensors))
        return cls(parts)

    def trainable_copy(self) -> LowRankParameters:
        """A copy that the optimizer updates."""
        copy = self.frozen()
        for tensor in copy.tensors:
            tensor.requires_grad_()
        return copy

    @torch.no_grad()
    def cap(self, dose: float) -> None:
        """Cap the norms of the vectors at `dose` times the norm of the typical activation at their site."""
        for part in self.by_site.values():
            longest = dose * len(part.vector) ** 0.5
            part.vector.mul_((longest / part.vector.norm().clamp(min=1e-30)).clamp(max=1.0))

    def doses(self) -> dict[Site, float]:
        """By site, the norm of the vector divided by the norm of the typical activation."""
        return {
            site: float(part.vector.detach().norm()) / len(part.vector) ** 0.5 for site, part in self.by_site.items()
        }


def nonzero_sites(scales: Mapping[Site, float]) -> list[Site]:
    """The sites in order. Raises `TrimtabError` if activations are zero or not finite, since they are the unit."""
    for site in sorted(scales):
        if not (scales[site] > 0 and math.isfinite(scales[site])):
            raise TrimtabError(f"the activations at {site} have norm {scales[site]}; nothing can be learned there")
    return sorted(scales)


def initial_parameters(
    layout: Layout, run: TeacherForcing, sites: Sequence[Site], texts: Sequence[PromptAnswer], start: Initializer[P]
) -> P:
    """The initial parameters of `start`, in units of the activations at the answers' tokens of the first few texts."""
    states = states_at(run, texts[:SCALE_TEXTS], {}, sites)
    widths = {site: place(layout, site).size for site in sites}
    return start(typical_scales(states), widths, next(iter(states.values()))[0].device)


def states_at(
    run: TeacherForcing, texts: Sequence[PromptAnswer], changes: Mapping[Site, Change], sites: Sequence[Site]
) -> dict[Site, list[Tensor]]:
    """At each site, each text's activations at its answer's tokens under these changes: `[tokens, width]`."""
    activations: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for numbers in group_by_pass(run.model, texts):
        for site, rows in run.states([texts[i] for i in numbers], changes, sites).items():
            activations[site] += rows
    return activations


def typical_scales(states: Mapping[Site, Sequence[Tensor]]) -> dict[Site, float]:
    """By site, the median over tokens of the root mean square of an activation's elements.

    The median, since in many models the activations of a few tokens (attention sinks) have a hundred times the norm.
    """
    return {
        site: float(torch.cat([x.float() for x in rows]).pow(2).mean(-1).sqrt().median())
        for site, rows in states.items()
    }
