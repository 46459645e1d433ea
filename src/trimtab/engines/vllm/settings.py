"""What an engine is told of steering when it starts: it travels in vLLM's own configuration, to every process and node.

There it is also part of the key of compiled graphs: one with the operator in it is never taken for one without.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from trimtab import __version__
from trimtab.errors import TrimtabError

KEY = "trimtab"
SLOTS = "TRIMTAB_SLOTS"
STEERINGS = "TRIMTAB_STEERINGS"


@dataclass(frozen=True)
class Settings:
    """`slots`: how many different states (a steering at a strength, in one phase) can be in the workers at a time.

    One of them is that of nothing.
    """

    slots: int = 128
    version: str = __version__


def settings_from_environment() -> Settings:
    """Raises `TrimtabError` where `$TRIMTAB_SLOTS` is no number of slots."""
    given = os.environ.get(SLOTS)
    if given is None:
        return Settings()
    if not given.isdecimal() or int(given) < 2:
        raise TrimtabError(f"{SLOTS} is a whole number from 2, got {given!r}")
    return Settings(int(given))


def patch_arguments(arguments: type, started: Callable[[Any], None]) -> None:
    """Let vLLM's `EngineArgs`, from which a front end starts its engine, put the settings into the configuration.

    `started` is called then, with the arguments.
    """
    original = arguments.create_engine_config  # type: ignore[attr-defined]

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        if not isinstance(config.additional_config, dict):
            raise TrimtabError("trimtab needs an additional_config that is a dictionary, or none")
        config.additional_config = {**config.additional_config, KEY: asdict(settings_from_environment())}
        started(self)
        return config

    arguments.create_engine_config = create_engine_config  # type: ignore[attr-defined]


def settings_of(config: Any) -> Settings:
    """The settings that an engine was started with."""
    return Settings(**config.additional_config.get(KEY, {}))
