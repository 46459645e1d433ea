"""`trimtab serve --engine vllm`: replace this process with vLLM's own server, with trimtab's plugin in it."""

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
    from trimtab.serve.vllm.settings import MiddlewareSettings

KEY = "TRIMTAB_API_KEY"
SETTINGS = "TRIMTAB_DOOR"
CLOSED = "TRIMTAB_CLOSED"

SUPPORTED_OPTIONS = ("steerings", "host", "port", "rows", "model", "dtype", "revision", "insecure", "engine", "vllm")
"""The options of `trimtab serve` that vLLM's server supports."""
MIDDLEWARE_OPTIONS = (
    "policy",
    "max_dose",
    "audit",
    "audit_prompts",
    "audit_sync",
    "access_log",
    "max_body",
    "max_held",
)
"""The options that the middleware in front of it supports."""
MIDDLEWARE = "trimtab.serve.vllm.middleware.SteeringMiddleware"
FORBIDDEN_OPTIONS = {
    "--grpc": "its gRPC server doesn't check the policy's keys",
    "--root-path": "the server is at the root path; a proxy can serve it elsewhere",
    "--api-key": "keys belong in the policy, or one in TRIMTAB_API_KEY",
}
"""vLLM options that can't be used with a policy."""

GROUPS = [f"vllm.{kind}_plugins" for kind in ("general", "platform", "io_processor", "stat_logger")]


def check_options(context: typer.Context) -> None:
    """Raise `TrimtabError` for an option on the command line that vLLM's server doesn't support."""
    for parameter in context.command.params:
        origin = context.get_parameter_source(parameter.name or "")
        if (
            origin is not None
            and origin.name == "COMMANDLINE"
            and parameter.name not in SUPPORTED_OPTIONS + MIDDLEWARE_OPTIONS
        ):
            raise TrimtabError(
                f"--{(parameter.name or '').replace('_', '-')} is an option of trimtab's own server, and --engine vllm"
                " starts vLLM's; leave out one of them"
            )


def vllm_command(
    *,
    model: str | None,
    host: str,
    port: int,
    rows: int | None,
    dtype: str,
    revision: str | None,
    vllm_options: Sequence[str],
) -> list[str]:
    """The command that starts vLLM's server with these options; `vllm_options` are options for vLLM, passed on
    unchanged.
    """
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
    if not any(argument.split("=")[0] in ("--served-model-name", "--served_model_name") for argument in vllm_options):
        command += ["--served-model-name", "trimtab", name]
    return [*command, *vllm_options, "--middleware", MIDDLEWARE]  # the last is the outermost


def vllm_environment(
    environment: Mapping[str, str],
    steerings: Path | None,
    vllm_options: Sequence[str] = (),
    middleware_settings: MiddlewareSettings | None = None,
    rules: Policy | None = None,
) -> dict[str, str]:
    """The environment for the server: the plugin with its routes, the steerings, the middleware's settings, and memory.

    `vllm_options` are options for vLLM; a memory setting among them isn't set again. `rules` is the middleware's
    policy. The key in TRIMTAB_API_KEY becomes vLLM's own key as well if it is the only one.
    """
    result = {**environment, **cpu_space(vllm_options, environment)}
    named = result.get("VLLM_PLUGINS")
    others = _plugins() if named is None else {plugin for plugin in named.split(",") if plugin}
    result["VLLM_PLUGINS"] = ",".join(sorted({"trimtab", *others}))
    result.setdefault("VLLM_USE_AOT_COMPILE", "0")  # on a CPU, vLLM can't load its compiled artifacts again
    if steerings is not None:
        result["TRIMTAB_STEERINGS"] = str(steerings)
    key = result.get(KEY)
    if key and (rules is None or len(rules.keys) == 1):
        result["VLLM_API_KEY"] = key
    if middleware_settings is not None and rules is not None:
        result[SETTINGS] = middleware_settings.to_text()
        result[CLOSED] = str(int(middleware_settings.closes(rules)))
    return result


def check_no_bypass(vllm_options: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raise `TrimtabError` for settings that would bypass the middleware of a server with a policy."""
    for option in vllm_options:
        name = option.split("=")[0].replace("_", "-")
        if name in FORBIDDEN_OPTIONS:
            raise TrimtabError(f"{name} can't be combined with a policy or an audit log: {FORBIDDEN_OPTIONS[name]}")
    if environment.get("VLLM_API_KEY"):
        raise TrimtabError(
            f"VLLM_API_KEY can't be combined with a policy or an audit log: {FORBIDDEN_OPTIONS['--api-key']}"
        )
    if environment.get("VLLM_USE_RUST_FRONTEND", "0") != "0":
        raise TrimtabError(
            "VLLM_USE_RUST_FRONTEND can't be combined with a policy or an audit log: that frontend doesn't run"
            " trimtab's middleware"
        )


def _plugins() -> set[str]:
    """The plugins that vLLM loads by default: all except those that add routes."""
    return {plugin.name for group in GROUPS for plugin in entry_points(group=group)}


def rules_of(middleware_settings: MiddlewareSettings, steerings: Path | None, vllm_options: Sequence[str]) -> Policy:
    """The middleware's policy. Raises `TrimtabError` before the start if it or the steerings can't be used."""
    from trimtab.engines.vllm.frontend import Names
    from trimtab.serve.vllm.middleware import check

    names = Names()
    if steerings is not None:
        names.load(steerings)
    rules = check(middleware_settings, names)
    if middleware_settings.closes(rules):
        check_no_bypass(vllm_options, os.environ)
    return rules


def hand_over(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Replace this process with vLLM's server."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], list(command), dict(environment))
