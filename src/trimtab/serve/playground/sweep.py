"""A sweep: one steering at several strengths and layers, on one prompt, as a grid of answers in one batch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trimtab.errors import TrimtabError
from trimtab.serve.playground.choices import AS_LEARNED, PanelState, Request, prompt_of, request
from trimtab.serve.service import Service


@dataclass(frozen=True)
class Sweep:
    """A steering, and the strengths and layers to try. `layers` may include `AS_LEARNED`."""

    name: str
    strengths: tuple[float, ...]
    layers: tuple[int, ...] = (AS_LEARNED,)

    def requests(self, service: Service, choice: PanelState, text: str) -> list[Request]:
        """One request per cell, row by row. Raises `TrimtabError` for more answers than a request may have."""
        count = len(self.strengths) * len(self.layers)
        if count > service.limits.answers:
            raise TrimtabError(f"that would be {count} answers; at most {service.limits.answers} are possible at once")
        requests = []
        for layer in self.layers:
            for strength in self.strengths:
                mine = replace(choice, steering=((self.name, strength, layer),))
                prompt = prompt_of(service, mine, [], text)
                requests.append(request(service, mine, prompt, steered=strength != 0))
        return requests

    def rows(self) -> list[str]:
        """The titles of the rows; without chosen layers, one empty title."""
        if self.layers == (AS_LEARNED,):
            return [""]
        return ["where it was learned" if layer == AS_LEARNED else f"layer {layer}" for layer in self.layers]


def numbers(text: str, what: str) -> tuple[float, ...]:
    """Numbers separated by commas or spaces, without duplicates. Raises `TrimtabError` for anything else."""
    values = []
    for word in re.split(r"[,;\s]+", text.strip().replace("\N{MINUS SIGN}", "-")):
        if not word:
            continue
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise TrimtabError(f"{word!r} isn't a number; {what} are numbers separated by commas")
        values.append(value)
    return tuple(dict.fromkeys(values))


def sweep_of(name: str | None, strengths: str, layers: str) -> Sweep:
    """The sweep that a user typed. Raises `TrimtabError` if it isn't one."""
    if not name:
        raise TrimtabError("choose a steering to sweep")
    pushed = numbers(strengths, "strengths")
    if not pushed:
        raise TrimtabError("type the strengths to try, such as -2, -1, 0, 1, 2")
    return Sweep(name, pushed, whole_numbers(layers) or (AS_LEARNED,))


def whole_numbers(text: str) -> tuple[int, ...]:
    """Layers, as a user typed them. Raises `TrimtabError` for anything else."""
    layers: Sequence[float] = numbers(text, "layers")
    for value in layers:
        if value != int(value) or value < 0:
            raise TrimtabError(f"a layer is a whole number, at least 0, not {value:g}")
    return tuple(int(value) for value in layers)
