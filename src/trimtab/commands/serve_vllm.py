"""`trimtab serve --engine vllm`: vLLM's own server takes this process over, with trimtab's plugin in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import NoReturn

import typer

from trimtab.engines.vllm.memory import cpu_space
from trimtab.errors import TrimtabError

PASSED = ("steerings", "host", "port", "rows", "model", "dtype", "revision", "insecure", "engine", "vllm")
"""The options of `trimtab serve` that vLLM's server can be told."""

GROUPS = [f"vllm.{kind}_plugins" for kind in ("general", "platform", "io_processor", "stat_logger")]


def check_options(context: typer.Context) -> None:
    """Raises `TrimtabError` for an option on the command line that vLLM's server has no place for."""
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "")
        if given is not None and given.name == "COMMANDLINE" and parameter.name not in PASSED:
            raise TrimtabError(
                f"--{(parameter.name or '').replace('_', '-')} is of trimtab's own server, and --engine vllm starts"
                " vLLM's; leave out one of them"
            )


def vllm_command(
    *,
    model: str | None,
    host: str,
    port: int,
    rows: int | None,
    dtype: str,
    revision: str | None,
    more: Sequence[str],
) -> list[str]:
    """What starts vLLM's server for these options; `more` are options of vLLM's, as they are."""
    from trimtab.engines.transformers.default_model import NAME, default_folder

    if model is not None and Path(model).suffix == ".gguf":
        raise TrimtabError("the vllm engine reads a folder or a Hub id; convert the GGUF file first")
    folder = model is None or Path(model).is_dir()
    name = NAME if model is None else Path(model).resolve().name if folder else model
    command = [sys.executable, "-m", "trimtab.engines.vllm.command_line", "serve"]
    command.append(str(default_folder() if model is None else model))
    command += ["--host", host, "--port", str(port)]
    command += ["--dtype", dtype] if dtype != "auto" else []
    command += ["--revision", revision] if revision is not None else []
    command += ["--max-num-seqs", str(rows)] if rows is not None else []
    if not any(one.split("=")[0] in ("--served-model-name", "--served_model_name") for one in more):
        command += ["--served-model-name", "trimtab", name]
    return [*command, *more]


def vllm_environment(
    environment: Mapping[str, str], steerings: Path | None, more: Sequence[str] = ()
) -> dict[str, str]:
    """This process's environment for the server: the plugin with its routes, the steerings, the API key, and memory.

    `more` are options of vLLM's; what they say of memory isn't said again.
    """
    found = {**environment, **cpu_space(more, environment)}
    named = found.get("VLLM_PLUGINS")
    others = _plugins() if named is None else {one for one in named.split(",") if one}
    found["VLLM_PLUGINS"] = ",".join(sorted({"trimtab", *others}))
    found.setdefault("VLLM_USE_AOT_COMPILE", "0")  # what vLLM keeps of it can't be loaded again on a CPU
    if steerings is not None:
        found["TRIMTAB_STEERINGS"] = str(steerings)
    if key := found.get("TRIMTAB_API_KEY"):
        found["VLLM_API_KEY"] = key
    return found


def _plugins() -> set[str]:
    """The plugins that vLLM loads unless it is told which: all, but for those that add routes."""
    return {one.name for group in GROUPS for one in entry_points(group=group)}


def hand_over(command: Sequence[str], environment: Mapping[str, str], steerings: Path | None) -> NoReturn:
    """Become vLLM's server. Raises `TrimtabError` before that, where it would be of no use."""
    from trimtab.engines.vllm.frontend import Names

    if steerings is not None:
        Names().load(steerings)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], list(command), dict(environment))
