"""Where steerings run."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

from trimtab import plugins
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.keywords import stray_of

ENGINES = {
    "llamacpp": "trimtab.engines.llamacpp.model:LlamaCpp",
    "vllm": "trimtab.engines.vllm.lm:VllmLM",
}
"""trimtab's engines beside transformers, which `LM` itself is: the class of each, whose `load` makes one of it.

Another distribution's is found by its entry point, which names such a class:

    [project.entry-points."trimtab.engines"]
    mine = "trimtab_mine:MyEngine"
"""
OWN = ("transformers", *ENGINES)


def engine(name: str) -> Any:
    """The class of an engine other than transformers.

    Raises:
        TrimtabError: There is no engine of this name, there are two, or it is a distribution's that can't be loaded.
    """
    plugin = plugins.plugin(plugins.ENGINES, name, OWN)
    if plugin is None:
        if name not in ENGINES:
            known = [*OWN, *plugins.plugins(plugins.ENGINES, OWN)]
            raise TrimtabError(f"there is no engine {name!r}; engines: {', '.join(known)}")
        return EntryPoint(name, ENGINES[name], plugins.ENGINES).load()
    made = plugin.load()
    if not callable(getattr(made, "load", None)):
        raise plugin.broken("it has no `load`, which makes an engine of a model's name")
    return made


def load(name: str, model: Any, options: dict[str, Any]) -> Any:
    """A model on an engine other than transformers, under these options of its own.

    Raises:
        TrimtabError: As `engine` does; an option that the engine doesn't have; and what its loading raises.
    """
    if options.pop("adapter", None) is not None:
        raise UnsupportedError(
            f"the {name} engine puts no adapter on a model; merge it (merge_and_unload), or use the transformers engine"
            " (leave out engine=, or --engine)"
        )
    try:
        return engine(name).load(model, **options)
    except TypeError as error:
        raise stray_of(error, f"LM.load(engine={name!r})", options, ()) or error from None
