"""`trimtab serve --engine vllm`: vLLM's own server takes this process over, with trimtab's plugin in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from trimtab.engines.vllm.memory import cpu_space
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.serve.policy import Policy
    from trimtab.serve.vllm.settings import DoorSettings

KEY = "TRIMTAB_API_KEY"
SETTINGS = "TRIMTAB_DOOR"
CLOSED = "TRIMTAB_CLOSED"

PASSED = ("steerings", "host", "port", "rows", "model", "dtype", "revision", "insecure", "engine", "vllm")
"""The options of `trimtab serve` that vLLM's server takes."""
AT_THE_DOOR = ("policy", "max_dose", "audit", "audit_prompts", "audit_sync", "access_log", "max_body", "max_held")
"""And those that the layer in front of it takes."""
DOOR = "trimtab.serve.vllm.door.Door"
PAST_THE_DOOR = {
    "--grpc": "its gRPC server asks for no keys of a policy",
    "--root-path": "the server stands at the root, from where a proxy can serve it",
    "--api-key": "the keys stand in the policy, or one in TRIMTAB_API_KEY",
}
"""Options of vLLM's that a server with a policy can't have."""

GROUPS = [f"vllm.{kind}_plugins" for kind in ("general", "platform", "io_processor", "stat_logger")]


def check_options(context: typer.Context) -> None:
    """Raises `TrimtabError` for an option on the command line that vLLM's server has no place for."""
    for parameter in context.command.params:
        origin = context.get_parameter_source(parameter.name or "")
        if origin is not None and origin.name == "COMMANDLINE" and parameter.name not in PASSED + AT_THE_DOOR:
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
    if not any(argument.split("=")[0] in ("--served-model-name", "--served_model_name") for argument in more):
        command += ["--served-model-name", "trimtab", name]
    return [*command, *more, "--middleware", DOOR]  # the last is the outermost


def vllm_environment(
    environment: Mapping[str, str],
    steerings: Path | None,
    more: Sequence[str] = (),
    door: DoorSettings | None = None,
    rules: Policy | None = None,
) -> dict[str, str]:
    """This process's environment for the server: the plugin with its routes, the steerings, the door, and memory.

    `more` are options of vLLM's; what they say of memory isn't said again. `rules` are the door's. A key that is the
    only one is vLLM's own as well.
    """
    result = {**environment, **cpu_space(more, environment)}
    named = result.get("VLLM_PLUGINS")
    others = _plugins() if named is None else {plugin for plugin in named.split(",") if plugin}
    result["VLLM_PLUGINS"] = ",".join(sorted({"trimtab", *others}))
    result.setdefault("VLLM_USE_AOT_COMPILE", "0")  # what vLLM keeps of it can't be loaded again on a CPU
    if steerings is not None:
        result["TRIMTAB_STEERINGS"] = str(steerings)
    key = result.get(KEY)
    if key and (rules is None or len(rules.keys) == 1):
        result["VLLM_API_KEY"] = key
    if door is not None and rules is not None:
        result[SETTINGS] = door.to_text()
        result[CLOSED] = str(int(door.closes(rules)))
    return result


def check_closed(more: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raises `TrimtabError` for what would lead past the door of a server with a policy."""
    for option in more:
        name = option.split("=")[0].replace("_", "-")
        if name in PAST_THE_DOOR:
            raise TrimtabError(f"{name} doesn't go with a policy or an audit log: {PAST_THE_DOOR[name]}")
    if environment.get("VLLM_API_KEY"):
        raise TrimtabError(f"VLLM_API_KEY doesn't go with a policy or an audit log: {PAST_THE_DOOR['--api-key']}")
    if environment.get("VLLM_USE_RUST_FRONTEND", "0") != "0":
        raise TrimtabError("VLLM_USE_RUST_FRONTEND doesn't go with a policy or an audit log: it has no such layer")


def _plugins() -> set[str]:
    """The plugins that vLLM loads by default: all, but for those that add routes."""
    return {plugin.name for group in GROUPS for plugin in entry_points(group=group)}


def rules_of(door: DoorSettings, steerings: Path | None, more: Sequence[str]) -> Policy:
    """What holds at the door. Raises `TrimtabError`, before a start, where it can't, or steerings can't be served."""
    from trimtab.engines.vllm.frontend import Names
    from trimtab.serve.vllm.door import check

    names = Names()
    if steerings is not None:
        names.load(steerings)
    rules = check(door, names)
    if door.closes(rules):
        check_closed(more, os.environ)
    return rules


def hand_over(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Become vLLM's server."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], list(command), dict(environment))
