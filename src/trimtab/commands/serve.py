"""`trimtab serve`: an OpenAI-compatible API with steering."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from trimtab.commands.config_file import ConfigOption
from trimtab.commands.model import PANEL, ModelOptions
from trimtab.commands.options import grouped
from trimtab.commands.serve_vllm import check_options, hand_over, rules_of, vllm_command, vllm_environment
from trimtab.commands.terminal import note, show
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.serve.library import Library
    from trimtab.serve.policy import Policy
    from trimtab.serve.vllm.settings import MiddlewareSettings

LIMITS = "Limits"
SAFETY = "Policy"
KEY = "TRIMTAB_API_KEY"


@grouped
def serve(
    *,
    context: typer.Context,
    vllm: Annotated[
        list[str] | None, typer.Argument(help="With --engine vllm: vLLM's own options, after --.", metavar="[-- …]")
    ] = None,
    steerings: Annotated[
        Path | None,
        typer.Option(
            help="A folder of steering files. Requests refer to them by file name. Without it, and without a policy,"
            " the default model comes with three to try.",
            metavar="DIR",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 chooses a free one.")] = 8000,
    upload: Annotated[
        bool, typer.Option("--upload", help="Let clients upload steering files. They are kept in memory only.")
    ] = False,
    learn: Annotated[
        bool,
        typer.Option(
            "--learn", help="Let clients learn steerings from pairs, or from a sentence. Other requests wait meanwhile."
        ),
    ] = False,
    playground: Annotated[bool, typer.Option("--playground/--no-playground", help="The playground page at /.")] = True,
    policy: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file: API keys, which steerings and strengths each may use, and what is always on.",
            metavar="FILE",
            rich_help_panel=SAFETY,
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Listen on other addresses without API keys.", rich_help_panel=SAFETY),
    ] = False,
    max_dose: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Refuse answers whose dose (relative norm, summed over all sites) exceeds this.",
            rich_help_panel=SAFETY,
        ),
    ] = None,
    audit: Annotated[
        Path | None,
        typer.Option(
            help="Append lines of JSON: the requester, what was applied, the outcome, and refused requests.",
            metavar="FILE",
            rich_help_panel=SAFETY,
        ),
    ] = None,
    audit_prompts: Annotated[
        bool, typer.Option("--audit-prompts", help="Write prompts into it as well.", rich_help_panel=SAFETY)
    ] = False,
    audit_sync: Annotated[
        bool,
        typer.Option(
            "--audit-sync",
            help="Wait until each line is on the disk itself: slower, but survives a power failure.",
            rich_help_panel=SAFETY,
        ),
    ] = False,
    access_log: Annotated[
        Path | None,
        typer.Option(
            help="Append a line of JSON for each request: when, who, what, status, seconds; - is standard error.",
            metavar="FILE",
        ),
    ] = None,
    otel: Annotated[
        bool,
        typer.Option(
            "--otel", help="Send a span of each request to the OpenTelemetry collector that OTEL_… variables name."
        ),
    ] = False,
    monitor: Annotated[
        list[str] | None,
        typer.Option(
            help="A direction or probe to read at each token, on request (`trimtab learn probe`). Repeatable.",
            metavar="NAME=FILE[@LAYER]",
        ),
    ] = None,
    clean_cache: Annotated[
        bool,
        typer.Option(
            "--clean-cache", help="Steer over the unsteered model's cache, unless a request says clean_cache: false."
        ),
    ] = False,
    prefix_cache: Annotated[
        int,
        typer.Option(
            min=0,
            help="Tokens of past texts to keep in the prefix cache, so that the next turn doesn't compute them again;"
            " 0 keeps none.",
            metavar="TOKENS",
            rich_help_panel=LIMITS,
        ),
    ] = 0,
    prefix_shared: Annotated[
        bool,
        typer.Option(
            "--prefix-shared",
            help="With --prefix-cache: share unsteered prefixes between API keys; response times then reveal what"
            " others asked.",
            rich_help_panel=SAFETY,
        ),
    ] = False,
    rows: Annotated[int, typer.Option(min=1, help="Answers decoded at a time.", rich_help_panel=LIMITS)] = 32,
    queue: Annotated[
        int,
        typer.Option(min=0, help="Answers that may wait in the queue; more get status 429.", rich_help_panel=LIMITS),
    ] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for an answer.", rich_help_panel=LIMITS)] = 300.0,
    grace: Annotated[
        float, typer.Option(min=0.0, help="Seconds to finish running requests, after SIGTERM.", rich_help_panel=LIMITS)
    ] = 60.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.", rich_help_panel=LIMITS)] = 512,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum tokens of a prompt. Default: the model's context.", rich_help_panel=LIMITS),
    ] = None,
    max_rejecting_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum tokens of a prompt with rejection, which is read in one pass while others wait.",
            rich_help_panel=LIMITS,
        ),
    ] = 2048,
    max_answers: Annotated[
        int, typer.Option(min=1, help="Maximum answers to one request.", rich_help_panel=LIMITS)
    ] = 16,
    max_images: Annotated[
        int,
        typer.Option(min=0, help="Maximum images of a prompt, for image-text models.", rich_help_panel=LIMITS),
    ] = 8,
    max_body: Annotated[int, typer.Option(min=1024, help="Maximum bytes of a request.", rich_help_panel=LIMITS)] = 1
    << 20,
    max_upload: Annotated[
        int,
        typer.Option(min=1024, help="Maximum bytes of an uploaded steering file.", rich_help_panel=LIMITS),
    ] = 16 << 20,
    max_held: Annotated[
        int,
        typer.Option(
            min=1 << 20, help="Maximum bytes of all requests together; more get status 429.", rich_help_panel=LIMITS
        ),
    ] = 256 << 20,
    connections: Annotated[
        int, typer.Option(min=1, help="Connections at a time; more get status 503.", rich_help_panel=LIMITS)
    ] = 512,
    loader: ModelOptions,
    engine: Annotated[
        str,
        typer.Option(help="transformers; or vllm, which must be installed: its own server.", rich_help_panel=PANEL),
    ] = "transformers",
    config: ConfigOption = None,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API, with steering in extra fields.

    [bold]  trimtab serve --steerings steerings/
      curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "trimtab", "temperature": 0,
             "messages": [{"role": "user", "content": "Name a fruit."}],
             "steering": [{"name": "json", "strength": 1.2}]}'[/bold]

    With OpenAI's Python client, put the extra fields into extra_body:

    [bold]  client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
      client.chat.completions.create(model="trimtab", messages=[…],
        extra_body={"steering": [{"name": "json", "strength": 1.2}]})[/bold]

    Each request has its own steering, and all run in one batch. "emphasize" takes
    phrases of the prompt; "rejection": {"beta": 0.5} weakens steering where it is
    implausible. The response's "trimtab" reports what was applied. /v1/steerings lists
    the steerings, /docs explains all fields, /metrics is for Prometheus, /healthz and
    /readyz are for orchestrators. The page at / is a playground: a chat with and
    without steering, side by side.

    A policy is a JSON file; all of it is optional:

    [bold]  {"keys": [{"name": "alice", "sha256": "…", "steerings": ["json"],
                 "strength": [0, 2], "max_dose": 0.5}],
       "always": [{"name": "safety", "strength": 1}],
       "monitors": [{"name": "harm", "threshold": 0.9, "action": "stop"}],
       "strength": [-4, 4], "max_dose": 1.0}[/bold]

    sha256 is the hash of the API key: printf %s "$KEY" | sha256sum. A single key can be
    given in the environment instead, as TRIMTAB_API_KEY. Without keys the server
    listens on this machine only, unless --insecure is given. No request can name,
    weaken, reject or push against a steering that is always on. max_dose limits the sum
    of the doses of all sites. A steering that a key uploads or learns (--upload,
    --learn) can be seen, used and deleted by that key only.

    --monitor harm=probe.safetensors reads a probe at each token: requests name it in
    "monitors", and the policy's monitors read every answer. Above its threshold a
    monitor is logged, stops the answer, or turns a steering on.

    On SIGTERM the server stops accepting requests and finishes those it has accepted.
    On SIGHUP it reads the folder of steerings again and reopens the access log.

    Every option can also be set in the environment, as TRIMTAB_SERVE_MAX_TOKENS, or in
    a TOML file (--config), as max-tokens = 256.

    With --engine vllm this starts vLLM's server, which accepts "steering" as well, and
    "emphasize" if TRIMTAB_SITES=keys is in its environment. It follows the same policy
    and audit log, but has its own options:

    [bold]  trimtab serve --engine vllm --steerings steerings/ -- --tensor-parallel-size 2[/bold]
    """
    if engine == "vllm":
        check_options(context)
        check_installed()
        _check_audit(audit, audit_prompts, audit_sync)
        from trimtab.serve.run import is_loopback
        from trimtab.serve.vllm.settings import MiddlewareSettings

        files = [None if options is None else str(options) for options in (policy, audit, access_log)]
        middleware_settings = MiddlewareSettings(
            files[0], max_dose, files[1], audit_prompts, audit_sync, files[2], max_body, max_held, is_loopback(host)
        )
        _serve_vllm(context, middleware_settings, steerings, host, port, insecure, rows, loader, vllm or [])
    if engine != "transformers":
        raise TrimtabError(f"--engine {engine} can't serve; transformers and vllm can")
    if vllm:
        raise TrimtabError(f"{vllm[0]!r} is not understood; only --engine vllm takes more options")
    check_installed()
    page = playground and find_spec("gradio") is not None
    from trimtab.serve.policy import check_names, policy_from

    rules = policy_from(policy, max_dose, os.environ.get(KEY))
    _check_audit(audit, audit_prompts, audit_sync)
    _check_reach(host, rules, insecure)
    if prefix_shared and not prefix_cache:
        raise TrimtabError("--prefix-shared needs a prefix cache; give --prefix-cache TOKENS")
    if steerings is not None and not steerings.is_dir():
        raise TrimtabError(f"there is no folder {steerings}; --steerings names a folder of steering files")
    from trimtab.serve.access import AccessLog
    from trimtab.serve.audit import Audit
    from trimtab.serve.connections import raise_file_limit
    from trimtab.serve.library import files_of
    from trimtab.serve.monitored import picks_of
    from trimtab.serve.run import bind, is_loopback
    from trimtab.serve.run import serve as run

    if steerings is not None:
        files_of(steerings)  # report an empty folder before a model is loaded
    picks_of(monitor or [])
    tracers = None
    if otel:
        from trimtab.serve.tracing import make_tracer_provider

        tracers = make_tracer_provider()
    accesses = None if access_log is None else AccessLog(access_log)
    audit_log = Audit(audit, prompts=audit_prompts, sync=audit_sync)
    bound = bind(host, port)
    lm = loader.load(quiet=False)
    from trimtab.engines.transformers.prefixes import RequestPrefixCache
    from trimtab.serve.app import make_app
    from trimtab.serve.library import Library, read_folder, reload
    from trimtab.serve.metrics import Metrics
    from trimtab.serve.monitored import read_monitors
    from trimtab.serve.packaged import packaged_library
    from trimtab.serve.scheduler import Scheduler
    from trimtab.serve.service import Limits, Service

    library = Library(lm)
    if steerings is not None:
        library = read_folder(lm, steerings)
    elif policy is None:  # with a policy, only its author decides what is served
        library = packaged_library(lm)
    check_names(rules, library.names)
    watching = read_monitors(lm, monitor or [])
    metrics = Metrics()
    prefixes = RequestPrefixCache(prefix_cache, shared=prefix_shared) if prefix_cache else None
    scheduler = Scheduler(lm, rows=rows, max_queued=queue, finished=metrics.count_answer, prefixes=prefixes)
    service = Service(
        lm,
        library,
        scheduler,
        rules,
        audit_log,
        metrics,
        Limits(
            max_body,
            max_upload,
            max_prompt_tokens,
            max_tokens,
            max_answers,
            timeout,
            max_held,
            max_rejecting_tokens,
            max_images,
        ),
        upload,
        learn,
        int(time.time()),
        clean_cache,
        watching,
        accesses,
    )
    assert service.always_on_monitors is not None  # the policy's monitors exist, and fit
    if clean_cache:
        lm.require("clean_cache")
    address = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
    web_app = make_app(service, local=is_loopback(host), playground=page, provider=tracers)
    _print_startup(address, library, rules, own=steerings is not None)
    if page:
        note(f"a page to try them on: {address}/", quiet=False)
    elif playground:
        note("no page to try them on: it needs gradio, pip install 'trimtab[serve]'", quiet=False)
    connection_limit = raise_file_limit(connections)
    if connection_limit < connections:
        note(f"{connection_limit} connections at a time: the system allows no more open files (ulimit -n)", quiet=False)

    def hangup() -> None:
        try:
            if accesses is not None:
                accesses.reopen()
            if steerings is not None:
                new, changed, removed = reload(library, steerings, rules)
                note(
                    f"read {steerings} again: {len(new)} new, {len(changed)} changed, {len(removed)} gone", quiet=False
                )
        except TrimtabError as error:
            note(f"nothing was reloaded: {error}", quiet=False)

    run(web_app, scheduler, bound, grace=grace, connections=connection_limit, hangup=hangup)
    note("stopped", quiet=False)


def _serve_vllm(
    context: typer.Context,
    middleware_settings: MiddlewareSettings,
    steerings: Path | None,
    host: str,
    port: int,
    insecure: bool,
    rows: int,
    loader: ModelOptions,
    vllm_options: list[str],
) -> NoReturn:
    from trimtab.engines.vllm.versions import check_version

    check_version()
    rules = rules_of(middleware_settings, steerings, vllm_options)
    _check_reach(host, rules, insecure)
    origin = context.get_parameter_source("rows")
    max_rows = rows if origin is not None and origin.name == "COMMANDLINE" else None
    about: dict[str, Any] = {"model": loader.model, "dtype": loader.dtype, "revision": loader.revision}
    command = vllm_command(host=host, port=port, rows=max_rows, vllm_options=vllm_options, **about)
    hand_over(command, vllm_environment(os.environ, steerings, vllm_options, middleware_settings, rules))


def _check_audit(audit: Path | None, prompts: bool, sync: bool) -> None:
    for enabled, name in ((prompts, "--audit-prompts"), (sync, "--audit-sync")):
        if enabled and audit is None:
            raise TrimtabError(f"{name} needs an audit log; give --audit FILE")


def check_installed() -> None:
    """Raise `TrimtabError` if a required package is missing."""
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(name) is None:
            raise TrimtabError(f"serving needs {name}: pip install 'trimtab[serve]'")


def _check_reach(host: str, rules: Policy, insecure: bool) -> None:
    from trimtab.serve.run import is_loopback

    if not is_loopback(host) and not rules.keys and not insecure:
        raise TrimtabError(
            f"--host {host} can be reached from other machines, and there are no API keys; set {KEY} or give a --policy"
            " with keys, or --insecure to let anybody send requests"
        )


def _print_startup(address: str, library: Library, rules: Policy, *, own: bool) -> None:
    from trimtab.serve.protected import protection_of

    show(f"serving {library.lm.name} at {address}")
    names = library.names
    listed = f"{', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
    included_hint = "" if own or not names else " (included with trimtab; --steerings names a folder of your own)"
    note(f"steerings: {listed or 'none; --steerings names a folder of them'}{included_hint}", quiet=False)
    if rules.always:
        note(f"always on: {', '.join(f'{name} at {strength:g}' for name, strength in rules.always)}", quiet=False)
        loaded = [(name, library.get(name)) for name, _ in rules.always]
        if unknown := protection_of(
            [(name, steering.steering) for name, steering in loaded if steering is not None]
        ).unknown:
            note(
                f"{unknown[0]} isn't made of directions of the residual stream, so requests can't be kept from undoing"
                " it: they may steer by emphasis only",
                quiet=False,
            )
    keys = (
        f"{len(rules.keys)} API key{'s' * (len(rules.keys) > 1)}"
        if rules.keys
        else "no API keys: anybody may send requests"
    )
    note(f"{keys}; fields and examples: {address}/docs", quiet=False)
