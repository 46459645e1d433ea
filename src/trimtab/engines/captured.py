"""The argument and the result of `lm.capture`: sites, and a prompt's activations at each of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering import Site
from trimtab.steering.integers import as_int


class Captured(dict[Site, Tensor]):
    """The activations of one prompt, `{site: [positions, width]}`; an integer key is a layer's residual stream."""

    def __missing__(self, key: Any) -> Tensor:
        layer = as_int(key)
        site = None if layer is None or layer < 0 else Site(layer)
        if site is None or site not in self:
            raise MissingSite(f"no activations at {key!r}; captured: {', '.join(map(str, self))}")
        return self[site]


class MissingSite(TrimtabError, KeyError):
    """A site that wasn't captured."""

    __str__ = Exception.__str__  # without the quotation marks of a KeyError


def sites_of(sites: Any) -> list[Site]:
    """The sites to capture, as a list. Raises `TrimtabError` for none, or for something that isn't a layer or site."""
    if isinstance(sites, Site):
        return [sites]
    if (number := as_int(sites)) is not None:
        return [Site(number)]
    listed = list(sites) if isinstance(sites, Iterable) and not isinstance(sites, (str, bytes)) else []
    if not listed:
        raise TrimtabError(
            f"sites must be one or more layers or Sites, such as 14 or [10, Site(14, 'heads')], got {sites!r}"
        )
    return [site if isinstance(site, Site) else Site(site) for site in listed]
