"""The `trimtab` program: its commands and its error handling.

Exit codes: 0 done, 1 failed while running, 2 bad input, 3 done and nothing is better than not steering (tune, make),
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from trimtab import __version__
from trimtab.commands import (  # noqa: F401 (importing registers them)
    eval_ab,
    eval_capability,
    eval_harness,
    eval_ifeval,
    eval_inspect,
    eval_judge,
    eval_refusal,
)
from trimtab.commands.audit import audit
from trimtab.commands.bake import bake
from trimtab.commands.bench import bench, forecast
from trimtab.commands.chat import chat
from trimtab.commands.config_file import FromEnvironment
from trimtab.commands.convert import convert
from trimtab.commands.demo import demo
from trimtab.commands.eval import evaluations
from trimtab.commands.generate import generate
from trimtab.commands.hub import list_, pull, push
from trimtab.commands.inspect import inspect
from trimtab.commands.learn import learn
from trimtab.commands.learn_method import DIRECT_METHODS, LearnCommand
from trimtab.commands.make import make
from trimtab.commands.methods import methods
from trimtab.commands.models import models
from trimtab.commands.serve import serve
from trimtab.commands.terminal import escape_unencodable, say, warnings_as_lines
from trimtab.commands.tune import tune
from trimtab.errors import TrimtabError
from trimtab.methods.recipe import find_recipe

TRACEBACK = "TRIMTAB_TRACEBACK"
UsageError: Any = typer.BadParameter.__mro__[1]  # recent typer bundles click, older ones import it; this fits both

app = typer.Typer(
    name="trimtab",
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trimtab {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def trimtab(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Steer language models: edit their activations while they generate.

    Learn a steering from pairs of texts, look at it, and generate with it:

    [bold]  trimtab learn instruct --pairs shout.jsonl --out shout.safetensors
      trimtab inspect shout.safetensors
      trimtab generate --steer shout.safetensors:2 --prompt "Hi" --compare[/bold]

    Without --model, a small default model is used. Every command takes --json
    and explains itself with --help.

    Exit codes: 0 done, 1 failed while running, 2 bad input, 3 tune or make
    found nothing better than not steering, 130 interrupted.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(demo)
app.command(cls=LearnCommand)(learn)
app.command()(make)
app.command()(tune)
app.add_typer(evaluations)
app.command()(bench)
app.command()(forecast)
app.command()(audit)
app.command()(generate)
app.command()(chat)
app.command()(inspect)
app.command(cls=FromEnvironment, context_settings={"auto_envvar_prefix": "TRIMTAB_SERVE"})(serve)
app.command()(convert)
app.command()(bake)
app.command("list")(list_)
app.command()(pull)
app.command()(push)
app.command()(models)
app.command()(methods)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; `arguments` default to `sys.argv[1:]`."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    escape_unencodable()
    try:
        with warnings_as_lines():
            code = app(argv, prog_name="trimtab", standalone_mode=False) or 0
        sys.stdout.flush()
    except TrimtabError as error:
        say(f"error: {error}")
        return 2
    except UsageError as error:
        message = error.format_message()
        hint = "; put a text with spaces in quotes" if "extra argument" in message else ""
        say(f"error: {message}{hint} (see {_help_command(argv)})")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # the reader of our output has closed it, as in `trimtab … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        say(f"error: {type(error).__name__}: {error} ({TRACEBACK}=1 shows where)")
        return 1
    if code == 130:
        say("interrupted")
    return code


def _help_command(arguments: list[str]) -> str:
    group, words = app, ["trimtab"]
    for name in [argument for argument in arguments if not argument.startswith("-")]:
        groups = {g.typer_instance.info.name: g.typer_instance for g in group.registered_groups if g.typer_instance}
        known = [command.name or command.callback.__name__ for command in group.registered_commands if command.callback]
        if name not in known and name not in groups:
            if words == ["trimtab", "learn"] and name not in DIRECT_METHODS and find_recipe(name) is not None:
                words.append(name)
            break
        words.append(name)
        if name == "learn":  # many methods have their own command
            continue
        if (subgroup := groups.get(name)) is None:
            break
        group = subgroup
    return f"{' '.join(words)} --help"
