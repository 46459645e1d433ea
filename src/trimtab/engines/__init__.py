"""Where steerings run."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

from trimtab import plugins
from trimtab.errors import TrimtabError

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
    found = plugins.plugin(plugins.ENGINES, name, OWN)
    if found is None:
        if name not in ENGINES:
            known = [*OWN, *plugins.plugins(plugins.ENGINES, OWN)]
            raise TrimtabError(f"there is no engine {name!r}; engines: {', '.join(known)}")
        return EntryPoint(name, ENGINES[name], plugins.ENGINES).load()
    made = found.load()
    if not callable(getattr(made, "load", None)):
        raise found.broken("it has no `load`, which makes an engine of a model's name")
    return made
