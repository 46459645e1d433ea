"""An engine's settings for steering: part of vLLM's configuration, which reaches every process and node.

There they are also part of the cache key of compiled graphs, so a graph with the operator is never mistaken for one
without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from trimtab import __version__
from trimtab.engines.vllm.attach import INSIDE
from trimtab.engines.vllm.capacity import ADDITIONS, Capacity, capacity_from
from trimtab.errors import TrimtabError

KEY = "trimtab"
SLOTS = "TRIMTAB_SLOTS"
MAPS = "TRIMTAB_MAPS"
STATIC = "TRIMTAB_STATIC"
FUSED = "TRIMTAB_FUSED"
INSIDE_BLOCKS = "TRIMTAB_SITES"
STEERINGS = "TRIMTAB_STEERINGS"


@dataclass(frozen=True)
class Settings:
    """An engine's settings.

    Args:
        slots: How many different states with additions can be in the workers at a time, including the empty one. A
            state is a steering at a strength, in one phase.
        maps: Likewise for states that do more than add, if captured graphs are replayed.
        capacity: What captured graphs can do, as plain data.
        sites: The kinds of sites inside blocks that also have an operator.
        static: Passes of at most this many tokens run the operators of captured graphs even if no graph is captured.
        fused: Whether these operators are one kernel, if Triton is available and gives the same results here.
        version: trimtab's version.
    """

    slots: int = 128
    maps: int = 17
    capacity: dict[str, Any] = field(default_factory=ADDITIONS.to_plain)
    sites: tuple[str, ...] = ()
    static: int = 0
    fused: bool = True
    version: str = __version__


def settings_from_environment(wanted: Capacity = ADDITIONS, sites: Collection[str] = ()) -> Settings:
    """The settings in the environment. If it doesn't set graphs or sites, they are those that are passed.

    Raises:
        TrimtabError: A variable can't be parsed.
    """
    capacity = capacity_from(os.environ)
    return Settings(
        _number(SLOTS, Settings.slots, 2),
        _number(MAPS, Settings.maps, 2),
        (wanted if capacity is None else capacity).to_plain(),
        tuple(sorted(sites)) if INSIDE_BLOCKS not in os.environ else _sites(os.environ[INSIDE_BLOCKS]),
        _number(STATIC, 0, 0),
        bool(_number(FUSED, 1, 0)),
    )


def _sites(text: str) -> tuple[str, ...]:
    kinds = sorted({name.strip() for name in text.split(",") if name.strip()} - {"residual"})
    if unknown := sorted(set(kinds) - set(INSIDE)):
        raise TrimtabError(f"{INSIDE_BLOCKS} lists kinds of sites ({', '.join(INSIDE)}), got {unknown[0]!r}")
    return tuple(kinds)


def _number(name: str, otherwise: int, least: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return otherwise
    if not text.isdecimal() or int(text) < least:
        raise TrimtabError(f"{name} is a whole number from {least}, got {text!r}")
    return int(text)


def patch_arguments(arguments: type, requirements: Callable[[Any], tuple[Capacity, Collection[str]]]) -> None:
    """Make vLLM's `EngineArgs`, from which a front end starts its engine, add the settings to the configuration.

    `requirements` is then called with the arguments; it returns what the steerings known at this point need.
    """
    original = arguments.create_engine_config  # type: ignore[attr-defined]

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        if not isinstance(config.additional_config, dict):
            raise TrimtabError("trimtab needs an additional_config that is a dictionary, or none")
        settings = settings_from_environment(*requirements(self))
        config.additional_config = {**config.additional_config, KEY: asdict(settings)}
        return config

    arguments.create_engine_config = create_engine_config  # type: ignore[attr-defined]


def settings_of(config: Any) -> Settings:
    """The settings that an engine was started with."""
    stored = config.additional_config.get(KEY, {})
    return Settings(**{**stored, "sites": tuple(stored.get("sites", ()))})
