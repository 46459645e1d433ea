"""The engines that run steerings."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

from trimtab import plugins
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.keywords import unknown_keyword_error_from

ENGINES = {
    "llamacpp": "trimtab.engines.llamacpp.model:LlamaCpp",
    "vllm": "trimtab.engines.vllm.lm:VllmLM",
}
"""trimtab's engines besides transformers, which is `LM` itself: the class of each, with a `load` method.

An engine in another distribution is found through its entry point, which names such a class:

    [project.entry-points."trimtab.engines"]
    mine = "trimtab_mine:MyEngine"
"""
BUILTIN_ENGINES = ("transformers", *ENGINES)


def engine(name: str) -> Any:
    """The class of an engine other than transformers.

    Raises:
        TrimtabError: There is no engine of this name, there are two, or another distribution's engine can't be loaded.
    """
    plugin = plugins.find_plugin(plugins.ENGINES, name, BUILTIN_ENGINES)
    if plugin is None:
        if name not in ENGINES:
            known = [*BUILTIN_ENGINES, *plugins.find_plugins(plugins.ENGINES, BUILTIN_ENGINES)]
            raise TrimtabError(f"there is no engine {name!r}; engines: {', '.join(known)}")
        return EntryPoint(name, ENGINES[name], plugins.ENGINES).load()
    made = plugin.load()
    if not callable(getattr(made, "load", None)):
        raise plugin.load_error("it has no `load` method, which loads a model by name")
    return made


def load(name: str, model: Any, options: dict[str, Any]) -> Any:
    """Load a model on an engine other than transformers, with that engine's own options.

    Raises:
        TrimtabError: As in `engine`; for an option that the engine doesn't have; and as its `load` does.
    """
    if options.pop("adapter", None) is not None:
        raise UnsupportedError(
            f"the {name} engine can't apply an adapter; merge it into the model (merge_and_unload), or use the"
            " transformers engine (leave out engine=, or --engine)"
        )
    try:
        return engine(name).load(model, **options)
    except TypeError as error:
        raise unknown_keyword_error_from(error, f"LM.load(engine={name!r})", options, ()) or error from None
