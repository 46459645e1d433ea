"""An engine's settings of steering when it starts: they travel in vLLM's own configuration, to every process and node.

There they are also part of the key of compiled graphs: one with the operator in it is never taken for one without.
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
    """What an engine starts with.

    Args:
        slots: How many different states (a steering at a strength, in one phase) that add can be in the workers at a
            time, that of nothing among them.
        maps: Likewise of states that do more than add, where captured graphs are replayed.
        capacity: What captured graphs can do, as plain data.
        sites: The kinds of sites inside of blocks at which there is an operator as well.
        static: Passes of at most so many tokens run the operators of captured graphs even where none is captured.
        fused: Whether these operators are one kernel, where there is Triton and it does the same here.
        version: trimtab's.
    """

    slots: int = 128
    maps: int = 17
    capacity: dict[str, Any] = field(default_factory=ADDITIONS.to_plain)
    sites: tuple[str, ...] = ()
    static: int = 0
    fused: bool = True
    version: str = __version__


def settings_from_environment(wanted: Capacity = ADDITIONS, sites: Collection[str] = ()) -> Settings:
    """The settings that the environment names; where it says nothing of graphs and sites, those that are wanted.

    Raises:
        TrimtabError: A variable isn't understood.
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
        raise TrimtabError(f"{INSIDE_BLOCKS} names kinds of sites, of {', '.join(INSIDE)}; got {unknown[0]!r}")
    return tuple(kinds)


def _number(name: str, otherwise: int, least: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return otherwise
    if not text.isdecimal() or int(text) < least:
        raise TrimtabError(f"{name} is a whole number from {least}, got {text!r}")
    return int(text)


def patch_arguments(arguments: type, started: Callable[[Any], tuple[Capacity, Collection[str]]]) -> None:
    """Let vLLM's `EngineArgs`, from which a front end starts its engine, put the settings into the configuration.

    `started` is called then, with the arguments; it says what the steerings that are known by then need.
    """
    original = arguments.create_engine_config  # type: ignore[attr-defined]

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        if not isinstance(config.additional_config, dict):
            raise TrimtabError("trimtab needs an additional_config that is a dictionary, or none")
        settings = settings_from_environment(*started(self))
        config.additional_config = {**config.additional_config, KEY: asdict(settings)}
        return config

    arguments.create_engine_config = create_engine_config  # type: ignore[attr-defined]


def settings_of(config: Any) -> Settings:
    """The settings that an engine was started with."""
    stored = config.additional_config.get(KEY, {})
    return Settings(**{**stored, "sites": tuple(stored.get("sites", ()))})
